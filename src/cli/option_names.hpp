// Messages of the library in the words of the command line.
#pragma once

#include <string>

namespace clusterfusion::cli {

// `message` with the names of the library's fields as the options that set them: "prompt_tokens[0]
// is ..." becomes "--prompt-tokens[0] is ...". Quoted words and parts of paths stay.
std::string with_option_names(const std::string& message);

}  // namespace clusterfusion::cli
