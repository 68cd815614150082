// Python's pickles, read as data: https://docs.python.org/3/library/pickletools.html
//
// A pickle is a program that builds objects. This reader knows the instructions that torch.save
// writes (protocol 2) and no others, and the names of Python objects that its caller allows and no
// others. It never looks a name up and never calls anything: what the program would call is kept as
// a `call` with its arguments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace clusterfusion {

struct PickleValue {
  enum class Kind {
    none,
    boolean,        // number
    integer,        // number
    real,           // real
    text,           // text
    tuple,          // items
    list,           // items
    dict,           // items: key, value, key, value, ...
    global,         // text: "module.name"
    call,           // items: what is called, its arguments (a tuple), then as in a dict
    persistent_id,  // items: one, what the writer put in an object's place
  };

  Kind kind = Kind::none;
  bool has_state = false;  // a call whose result is given further state, which is passed over
  std::int64_t number = 0;
  double real = 0;
  std::string text;
  std::vector<const PickleValue*> items;

  bool is(Kind other) const noexcept { return kind == other; }
  // Whether this is a call of the global `name`.
  bool is_call_of(std::string_view name) const noexcept;
  // The keys and values of a dict, or of a dict-like object that a call makes.
  std::span<const PickleValue* const> entries() const noexcept;
};

// For messages: "None", "a list", "a call of torch._utils._rebuild_tensor_v2".
std::string describe(const PickleValue& value);

// Owns its values, which may refer to each other in any way, also in circles.
class Pickle {
 public:
  // Runs the whole of `bytes`; `where` stands for them in messages. `allowed` are the globals that
  // it may name, as "module.name".
  // Errors: malformed; unsupported for any other instruction, global or protocol.
  Pickle(std::span<const std::byte> bytes, const std::string& where,
         std::span<const std::string_view> allowed);
  Pickle(const Pickle&) = delete;
  Pickle& operator=(const Pickle&) = delete;

  const PickleValue& root() const noexcept { return *root_; }

 private:
  std::deque<PickleValue> values_;  // addresses stay as they are
  const PickleValue* root_ = nullptr;
};

}  // namespace clusterfusion
