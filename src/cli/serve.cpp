// clusterfusion serve: the server is a part of the Python package.
#include "cli/python_command.hpp"

namespace clusterfusion::cli {

void add_serve_command(CLI::App& app, Command& selected) {
  add_python_command(app, selected,
                     {.name = "serve",
                      .description = "Serve a model by the OpenAI API.",
                      .example = "clusterfusion serve models/demo --port 8000",
                      .activity = "serving",
                      .module = "clusterfusion.serve.__main__",
                      .extra = "serve"});
}

}  // namespace clusterfusion::cli
