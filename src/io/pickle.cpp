#include "io/pickle.hpp"

#include <simdjson.h>

#include <algorithm>
#include <array>
#include <bit>
#include <unordered_map>
#include <utility>

#include "base/fail.hpp"
#include "io/byte_reader.hpp"
#include "io/json.hpp"

namespace clusterfusion {
namespace {

using Kind = PickleValue::Kind;

// A value takes some hundred bytes for one of the pickle's; a checkpoint's takes some hundred
// bytes a tensor.
constexpr std::size_t kMaxPickleBytes = 16 << 20;
constexpr std::uint64_t kProtocol = 2;

// The instructions that are known: https://github.com/python/cpython/blob/main/Lib/pickle.py
enum Opcode : std::uint8_t {
  kProto = 0x80,
  kStop = '.',
  kMark = '(',
  kNone = 'N',
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kLong1 = 0x8a,
  kBinFloat = 'G',
  kBinUnicode = 'X',
  kEmptyTuple = ')',
  kTuple = 't',
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kEmptyList = ']',
  kAppend = 'a',
  kAppends = 'e',
  kEmptyDict = '}',
  kSetItem = 's',
  kSetItems = 'u',
  kGlobal = 'c',
  kReduce = 'R',
  kBuild = 'b',
  kBinPersistentId = 'Q',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kBinPut = 'q',
  kLongBinPut = 'r',
};

struct OpcodeName {
  std::uint8_t opcode;
  std::string_view name;
};

// The others, to refuse them by name.
constexpr std::array<OpcodeName, 37> kRefused{{
    {'0', "POP"},
    {'1', "POP_MARK"},
    {'2', "DUP"},
    {'F', "FLOAT"},
    {'I', "INT"},
    {'L', "LONG"},
    {'P', "PERSID"},
    {'S', "STRING"},
    {'T', "BINSTRING"},
    {'U', "SHORT_BINSTRING"},
    {'V', "UNICODE"},
    {'B', "BINBYTES"},
    {'C', "SHORT_BINBYTES"},
    {'d', "DICT"},
    {'g', "GET"},
    {'i', "INST"},
    {'l', "LIST"},
    {'o', "OBJ"},
    {'p', "PUT"},
    {0x81, "NEWOBJ"},
    {0x82, "EXT1"},
    {0x83, "EXT2"},
    {0x84, "EXT4"},
    {0x8b, "LONG4"},
    {0x8c, "SHORT_BINUNICODE"},
    {0x8d, "BINUNICODE8"},
    {0x8e, "BINBYTES8"},
    {0x8f, "EMPTY_SET"},
    {0x90, "ADDITEMS"},
    {0x91, "FROZENSET"},
    {0x92, "NEWOBJ_EX"},
    {0x93, "STACK_GLOBAL"},
    {0x94, "MEMOIZE"},
    {0x95, "FRAME"},
    {0x96, "BYTEARRAY8"},
    {0x97, "NEXT_BUFFER"},
    {0x98, "READONLY_BUFFER"},
}};

std::string_view name_of_refused(std::uint8_t opcode) {
  for (const OpcodeName& refused : kRefused) {
    if (refused.opcode == opcode) return refused.name;
  }
  return "unknown";
}

// A stack, marks on it, and a memo of values that come again.
class Machine {
 public:
  Machine(std::span<const std::byte> bytes, const std::string& where,
          std::span<const std::string_view> allowed, std::deque<PickleValue>& values)
      : reader_(bytes, where), allowed_(allowed), values_(values) {}

  // Runs to the end and returns the value that is left.
  const PickleValue* run() {
    begin_ = 0;
    require(reader_.number(1, "an instruction") == kProto, ErrorKind::malformed,
            "{}: expected a pickle of protocol 2, found none", reader_.where());
    const std::uint64_t protocol = reader_.number(1, "a protocol");
    require(protocol == kProtocol, ErrorKind::unsupported,
            "{}: a pickle of protocol {}; expected {}, as torch.save writes it by default: load it "
            "in PyTorch and save it again",
            reader_.where(), protocol, kProtocol);
    while (true) {
      begin_ = reader_.position();
      const auto opcode = static_cast<std::uint8_t>(reader_.number(1, "an instruction"));
      if (opcode == kStop) break;
      if (!make_scalar(opcode) && !make_container(opcode) && !fill_container(opcode) &&
          !use_memo(opcode) && !make_object(opcode)) {
        fail(ErrorKind::unsupported,
             "{}: the instruction {} (0x{:02x}) at byte {} is not one of those that torch.save "
             "writes for tensors; nothing of the file was executed",
             reader_.where(), name_of_refused(opcode), opcode, begin_);
      }
    }
    PickleValue* root = pop();
    require_well_formed(stack_.empty() && marks_.empty(), "more than one value is left at the end");
    require_well_formed(reader_.at_end(), "bytes follow its end");
    return root;
  }

 private:
  void require_well_formed(bool condition, const char* what) const {
    require(condition, ErrorKind::malformed, "{}: broken pickle at byte {}: {}", reader_.where(),
            begin_, what);
  }

  PickleValue* push(Kind kind) {
    PickleValue* value = &values_.emplace_back();
    value->kind = kind;
    stack_.push_back(value);
    return value;
  }
  void push_number(Kind kind, std::int64_t number) { push(kind)->number = number; }

  // The height of the stack that belongs to the mark below.
  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  PickleValue* top() const {
    require_well_formed(stack_.size() > floor(), "an instruction finds no value");
    return stack_.back();
  }
  PickleValue* pop() {
    PickleValue* value = top();
    stack_.pop_back();
    return value;
  }
  // The values above the last mark, which goes.
  std::vector<const PickleValue*> pop_to_mark() {
    require_well_formed(!marks_.empty(), "an instruction finds no mark");
    const auto begin = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<const PickleValue*> popped(begin, stack_.end());
    stack_.erase(begin, stack_.end());
    marks_.pop_back();
    return popped;
  }
  std::vector<const PickleValue*> pop_many(std::size_t count) {
    std::vector<const PickleValue*> popped(count);
    for (std::size_t i = count; i-- > 0;) popped[i] = pop();
    return popped;
  }

  std::int64_t read_long() {
    const std::uint64_t count = reader_.number(1, "a length");
    require_well_formed(count <= 8, "an integer of more than 64 bits");
    if (count == 0) return 0;
    const std::uint64_t shift = 64 - 8 * count;
    const std::uint64_t value = reader_.number(static_cast<std::size_t>(count), "an integer");
    return static_cast<std::int64_t>(value << shift) >> shift;  // extends the sign
  }
  double read_real() {  // big-endian, unlike all others
    std::uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) bits = bits << 8 | reader_.number(1, "a real number");
    return std::bit_cast<double>(bits);
  }

  bool make_scalar(std::uint8_t opcode) {
    switch (opcode) {
      case kNone: push(Kind::none); return true;
      case kNewTrue: push_number(Kind::boolean, 1); return true;
      case kNewFalse: push_number(Kind::boolean, 0); return true;
      case kBinInt: {
        const auto bits = static_cast<std::uint32_t>(reader_.number(4, "an integer"));
        push_number(Kind::integer, static_cast<std::int32_t>(bits));
        return true;
      }
      case kBinInt1:
        push_number(Kind::integer, static_cast<std::int64_t>(reader_.number(1, "an integer")));
        return true;
      case kBinInt2:
        push_number(Kind::integer, static_cast<std::int64_t>(reader_.number(2, "an integer")));
        return true;
      case kLong1: push_number(Kind::integer, read_long()); return true;
      case kBinFloat: {
        const double real = read_real();
        push(Kind::real)->real = real;
        return true;
      }
      case kBinUnicode: {
        const std::string_view text = reader_.text(reader_.number(4, "a length"), "a text");
        require_well_formed(simdjson::validate_utf8(text), "a text is not UTF-8");
        push(Kind::text)->text = text;
        return true;
      }
      default: return false;
    }
  }

  void push_items(Kind kind, std::vector<const PickleValue*> items) {
    push(kind)->items = std::move(items);
  }

  bool make_container(std::uint8_t opcode) {
    switch (opcode) {
      case kMark: marks_.push_back(stack_.size()); return true;
      case kEmptyTuple: push(Kind::tuple); return true;
      case kEmptyList: push(Kind::list); return true;
      case kEmptyDict: push(Kind::dict); return true;
      case kTuple: push_items(Kind::tuple, pop_to_mark()); return true;
      case kTuple1: push_items(Kind::tuple, pop_many(1)); return true;
      case kTuple2: push_items(Kind::tuple, pop_many(2)); return true;
      case kTuple3: push_items(Kind::tuple, pop_many(3)); return true;
      default: return false;
    }
  }

  void append(const std::vector<const PickleValue*>& items) {
    PickleValue* list = top();
    require_well_formed(list->is(Kind::list), "an element is appended to what is no list");
    list->items.insert(list->items.end(), items.begin(), items.end());
  }
  void set_items(const std::vector<const PickleValue*>& items) {
    PickleValue* dict = top();
    require_well_formed(items.size() % 2 == 0, "a key without a value");
    require_well_formed(dict->is(Kind::dict) || dict->is(Kind::call),
                        "an entry is set in what is no dict");
    dict->items.insert(dict->items.end(), items.begin(), items.end());
  }

  bool fill_container(std::uint8_t opcode) {
    switch (opcode) {
      case kAppend: append(pop_many(1)); return true;
      case kAppends: append(pop_to_mark()); return true;
      case kSetItem: set_items(pop_many(2)); return true;
      case kSetItems: set_items(pop_to_mark()); return true;
      default: return false;
    }
  }

  void get(std::uint64_t index) {
    const auto found = memo_.find(index);
    require_well_formed(found != memo_.end(), "a value is taken from the memo that is not there");
    stack_.push_back(found->second);
  }
  void put(std::uint64_t index) { memo_[index] = top(); }

  bool use_memo(std::uint8_t opcode) {
    switch (opcode) {
      case kBinGet: get(reader_.number(1, "an index")); return true;
      case kLongBinGet: get(reader_.number(4, "an index")); return true;
      case kBinPut: put(reader_.number(1, "an index")); return true;
      case kLongBinPut: put(reader_.number(4, "an index")); return true;
      default: return false;
    }
  }

  void push_global() {
    const std::string_view module = reader_.line("a module's name");
    const std::string_view name = reader_.line("a name");
    std::string global = fmt::format("{}.{}", module, name);
    require(std::find(allowed_.begin(), allowed_.end(), global) != allowed_.end(),
            ErrorKind::unsupported,
            "{}: asks for the Python object {} at byte {}; expected only what tensors need. "
            "Nothing of the file was executed. If you trust its author, load it in PyTorch and "
            "save its tensors alone",
            reader_.where(), quote(global), begin_);
    push(Kind::global)->text = std::move(global);
  }
  void push_call() {
    std::vector<const PickleValue*> parts = pop_many(2);
    require_well_formed(parts[0]->is(Kind::global), "what is called is no global");
    require_well_formed(parts[1]->is(Kind::tuple), "the arguments of a call are no tuple");
    push_items(Kind::call, std::move(parts));
  }
  void build() {
    pop();
    PickleValue* object = top();
    require_well_formed(object->is(Kind::call), "state is given to what is no object");
    object->has_state = true;
  }

  bool make_object(std::uint8_t opcode) {
    switch (opcode) {
      case kGlobal: push_global(); return true;
      case kReduce: push_call(); return true;
      case kBuild: build(); return true;
      case kBinPersistentId: push_items(Kind::persistent_id, pop_many(1)); return true;
      default: return false;
    }
  }

  ByteReader reader_;
  std::span<const std::string_view> allowed_;
  std::deque<PickleValue>& values_;
  std::vector<PickleValue*> stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint64_t, PickleValue*> memo_;
  std::size_t begin_ = 0;  // of the current instruction
};

}  // namespace

bool PickleValue::is_call_of(std::string_view name) const noexcept {
  return kind == Kind::call && items[0]->text == name;
}

std::span<const PickleValue* const> PickleValue::entries() const noexcept {
  const std::span<const PickleValue* const> all(items);
  return kind == Kind::call ? all.subspan(2) : all;
}

std::string describe(const PickleValue& value) {
  switch (value.kind) {
    case Kind::none: return "None";
    case Kind::boolean: return value.number != 0 ? "True" : "False";
    case Kind::integer: return fmt::format("the integer {}", value.number);
    case Kind::real: return fmt::format("the number {}", value.real);
    case Kind::text: return fmt::format("the text {}", quote(value.text));
    case Kind::tuple: return fmt::format("a tuple of {}", value.items.size());
    case Kind::list: return fmt::format("a list of {}", value.items.size());
    case Kind::dict: return "a dict";
    case Kind::global: return value.text;
    case Kind::call: return fmt::format("a call of {}", value.items[0]->text);
    case Kind::persistent_id: return "a persistent id";
  }
  return "";
}

Pickle::Pickle(std::span<const std::byte> bytes, const std::string& where,
               std::span<const std::string_view> allowed) {
  require(bytes.size() <= kMaxPickleBytes, ErrorKind::unsupported,
          "{}: too large: expected at most {} bytes, found {}", where, kMaxPickleBytes,
          bytes.size());
  root_ = Machine(bytes, where, allowed, values_).run();
}

}  // namespace clusterfusion
