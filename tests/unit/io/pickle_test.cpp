#include "io/pickle.hpp"

#include <array>
#include <string>

#include "io/torch_fixtures.hpp"

namespace clusterfusion {
namespace {

namespace pickled = test::pickled;
using Kind = PickleValue::Kind;
using test::expect_error;
using test::join;
using test::little;

constexpr std::array<std::string_view, 1> kAllowed{"collections.OrderedDict"};

// The description of what a pickle with this body leaves.
std::string read(const std::string& body) {
  const std::string file = pickled::file(body);
  return describe(Pickle(std::as_bytes(std::span(file)), "p.pkl", kAllowed).root());
}

void expect_malformed(std::vector<std::string> words, const std::string& body) {
  words.push_back("p.pkl");
  expect_error(ErrorKind::malformed, words, [&] { read(body); });
}

void expect_unsupported(std::vector<std::string> words, const std::string& body) {
  words.push_back("p.pkl");
  expect_error(ErrorKind::unsupported, words, [&] { read(body); });
}

TEST(Pickle, ReadsScalars) {
  EXPECT_EQ(read("N"), "None");
  EXPECT_EQ(read("\x88"), "True");
  EXPECT_EQ(read("\x89"), "False");
  EXPECT_EQ(read("K\xff"), "the integer 255");
  EXPECT_EQ(read("M\xff\xff"), "the integer 65535");
  EXPECT_EQ(read("J\xff\xff\xff\xff"), "the integer -1");
  EXPECT_EQ(read(std::string("\x8a\0", 2)), "the integer 0");
  EXPECT_EQ(read("\x8a\x01\xff"), "the integer -1");
  EXPECT_EQ(read(std::string("\x8a\x05\0\0\0\0\x01", 7)), "the integer 4294967296");
  EXPECT_EQ(read(pickled::number(INT64_MIN)), "the integer -9223372036854775808");
  EXPECT_EQ(read(std::string("G\x3f\xf8\0\0\0\0\0\0", 9)), "the number 1.5");
  EXPECT_EQ(read(pickled::text("ä")), "the text \"ä\"");
}

TEST(Pickle, ReadsContainers) {
  EXPECT_EQ(read(")"), "a tuple of 0");
  EXPECT_EQ(read("NN\x86"), "a tuple of 2");
  EXPECT_EQ(read("(NNNNt"), "a tuple of 4");
  EXPECT_EQ(read("](NNe"), "a list of 2");
  EXPECT_EQ(read("]Na"), "a list of 1");
  const std::string file = pickled::file("}NNs(NNNNu");
  const Pickle dict(std::as_bytes(std::span(file)), "p.pkl", kAllowed);
  EXPECT_EQ(describe(dict.root()), "a dict");
  EXPECT_EQ(dict.root().entries().size(), 6U);
}

TEST(Pickle, RemembersValues) {
  EXPECT_EQ(read("K\x07q\x05Nh\x05\x87"), "a tuple of 3") << "three are there only with the memo";
  const std::string file =
      pickled::file(join({"K\x07r", little(70000, 4), "j", little(70000, 4), "\x86"}));
  const Pickle pair(std::as_bytes(std::span(file)), "p.pkl", kAllowed);
  EXPECT_EQ(pair.root().items[0], pair.root().items[1]);
  expect_malformed({"memo"}, "h\x05");
}

// A list that holds itself: nobody frees it twice, and nobody follows it for ever.
TEST(Pickle, ReadsACircle) {
  EXPECT_EQ(read("]q\x01h\x01"
                 "a"),
            "a list of 1");
}

TEST(Pickle, ReadsDeepNesting) {
  EXPECT_EQ(read(join({"N", std::string(1'000'000, '\x85')})), "a tuple of 1");
}

TEST(Pickle, KeepsCallsWithoutCalling) {
  const std::string file =
      pickled::file(pickled::entries(pickled::ordered_dict(), {{"a", "N"}}) + "}b");
  const Pickle call(std::as_bytes(std::span(file)), "p.pkl", kAllowed);
  EXPECT_TRUE(call.root().is_call_of("collections.OrderedDict"));
  EXPECT_TRUE(call.root().has_state);
  ASSERT_EQ(call.root().entries().size(), 2U);
  EXPECT_EQ(call.root().entries()[0]->text, "a");
}

TEST(Pickle, RefusesOtherGlobals) {
  for (const auto& [module, name] :
       {std::pair("os", "system"), std::pair("builtins", "eval"), std::pair("builtins", "getattr"),
        std::pair("torch", "load"), std::pair("collections", "OrderedDict.x"),
        std::pair("collections.OrderedDict", ""), std::pair("", "collections.OrderedDict")}) {
    expect_unsupported({std::string(module) + "." + name, "byte 2", "executed"},
                       pickled::global(module, name) + pickled::text("id") + "\x85R");
  }
}

// Each of the 256 opcodes either belongs to those of torch.save or is refused by its name.
TEST(Pickle, RefusesOtherInstructions) {
  const std::string known = "\x80.(N\x88\x89JKM\x8aGX)t\x85\x86\x87]ae}sucRbQhjqr";
  int refused = 0;
  for (int opcode = 0; opcode < 256; ++opcode) {
    const char code = static_cast<char>(opcode);
    if (known.find(code) != known.npos) continue;
    expect_unsupported({"byte 3", "torch.save", "executed"}, join({"N", {&code, 1}}));
    ++refused;
  }
  EXPECT_EQ(refused, 256 - 31);
  expect_unsupported({"STACK_GLOBAL (0x93)"}, "\x93");
  expect_unsupported({"NEWOBJ (0x81)"}, "\x81");
  expect_unsupported({"INST (0x69)"}, "i");
  expect_unsupported({"unknown (0xff)"}, "\xff");
}

TEST(Pickle, RefusesOtherProtocols) {
  for (const std::string& start : {std::string("\x80\x04"), std::string("\x80\x00", 2)}) {
    const std::string file = start + "N.";
    expect_error(ErrorKind::unsupported, {"p.pkl", "protocol", "expected 2"},
                 [&] { Pickle(std::as_bytes(std::span(file)), "p.pkl", kAllowed); });
  }
  const std::string none = "N.";
  expect_error(ErrorKind::malformed, {"p.pkl", "protocol 2"},
               [&] { Pickle(std::as_bytes(std::span(none)), "p.pkl", kAllowed); });
}

TEST(Pickle, RefusesBrokenPrograms) {
  expect_malformed({"finds no value"}, "");
  expect_malformed({"finds no value"}, "N\x86");
  expect_malformed({"finds no value"}, "N(\x85");
  expect_malformed({"finds no mark"}, "Nt");
  expect_malformed({"more than one value"}, "NN");
  expect_malformed({"more than one value"}, "(N");
  expect_malformed({"bytes follow"}, "N.N");
  expect_malformed({"no list"}, "NNa");
  expect_malformed({"no dict"}, "NNNs");
  expect_malformed({"key without a value"}, "}(Nu");
  expect_malformed({"no global"}, "N)R");
  expect_malformed({"no tuple"}, pickled::global("collections", "OrderedDict") + "]R");
  expect_malformed({"no object"}, "NNb");
  expect_malformed({"64 bits"}, join({"\x8a\x09", std::string(9, 'x')}));
  expect_malformed({"not UTF-8"}, pickled::text("\xff"));
  expect_malformed({"truncated"}, join({"X", little(0xFFFFFFFF, 4), "abc"}));
  expect_malformed({"truncated"}, "cno line");
  expect_malformed({"truncated"}, "cone line\nonly");
}

TEST(Pickle, RefusesAFileTooLarge) {
  const std::string file(17 << 20, 'N');
  expect_error(ErrorKind::unsupported, {"p.pkl", "too large"},
               [&] { Pickle(std::as_bytes(std::span(file)), "p.pkl", kAllowed); });
}

}  // namespace
}  // namespace clusterfusion
