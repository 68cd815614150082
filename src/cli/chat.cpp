// clusterfusion chat: a part of the Python package, as chat templates are.
#include "cli/python_command.hpp"

namespace clusterfusion::cli {

void add_chat_command(CLI::App& app, Command& selected) {
  add_python_command(app, selected,
                     {.name = "chat",
                      .description = "Talk with a model that has a chat template.",
                      .example = "clusterfusion chat SmolLM2-135M-Instruct",
                      .activity = "chatting",
                      .module = "clusterfusion.chat.__main__",
                      .extra = "chat"});
}

}  // namespace clusterfusion::cli
