// What goes to standard error: errors, warnings and notes, with colour on a terminal only.
#pragma once

#include <string_view>

namespace clusterfusion::cli {

// A terminal that understands escape sequences (TERM is not "dumb").
bool stderr_is_terminal();
bool stdin_is_terminal();
bool stdout_is_terminal();
// Columns of the terminal at standard error; 80 if unknown.
int terminal_columns();

// Writes to standard error; that it cannot be written is never an error.
void write_stderr(std::string_view text);

// "clusterfusion: error: MESSAGE" as one line.
void print_error(std::string_view message);
void print_warning(std::string_view message);

}  // namespace clusterfusion::cli
