#include "tokenizer/tokenizer_file.hpp"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "base/fail.hpp"
#include "io/json.hpp"
#include "tokenizer/byte_alphabet.hpp"
#include "tokenizer/pipeline_file.hpp"

namespace clusterfusion {
namespace {

bool prefixes_first(const PreTokenizer& pre_tokenizer) {
  return std::ranges::any_of(pre_tokenizer.steps(), [](const PreTokenizerStep& step) {
    const auto* metaspace = std::get_if<Metaspace>(&step);
    return metaspace != nullptr && metaspace->prefix == Metaspace::Prefix::first;
  });
}

bool takes_beginnings(const std::vector<NormalizerStep>& steps) {
  return std::ranges::any_of(steps, [](const NormalizerStep& step) {
    const auto* strip = std::get_if<Strip>(&step);
    const auto* replace = std::get_if<Replace>(&step);
    return (strip != nullptr && strip->left) || (replace != nullptr && replace->content.empty());
  });
}

constexpr IntegerRange kTokenIdRange{0, std::numeric_limits<TokenId>::max() - 1};

using Element = simdjson::dom::element;

// The value of `key` without a JsonValue for each of its thousands of members.
const Element& element_at(const JsonObject& object, const JsonValue& parent, const char* key) {
  for (const JsonObject::Member& member : object.members()) {
    if (member.first == key) return member.second;
  }
  fail(ErrorKind::malformed, "{} has no key \"{}\"", parent.where(), key);
}

// Reads the parts of a tokenizer.json one after the other into a TokenizerFile.
class Reader {
 public:
  Reader(const JsonValue& root, TokenizerFile& file) : root_(root), top_(root), file_(file) {}

  void read() {
    check_version();
    // What another kind of tokenizer has elsewhere is nobody's business.
    const JsonValue model = top_.at("model");
    check_model_type(JsonObject(model), model);
    // "truncation" and "padding" are left over from training; transformers resets them too.
    read_pipeline();
    read_model();
    read_added_tokens();
    if (const auto processor = top_.find_non_null("post_processor")) read_processor(*processor);
  }

 private:
  void check_version() const {
    const std::optional<JsonValue> version = top_.find_non_null("version");
    if (version && version->string() != "1.0") refuse_value(*version, version->string(), "\"1.0\"");
  }

  // --- model ---

  void read_model() {
    const JsonValue value = top_.at("model");
    const JsonObject model(value);
    check_model_options(model);
    read_vocabulary(JsonObject(model.at("vocab")), model.at("vocab").where());
    if (file_.is_byte_level()) {
      check_alphabet(model);
    } else {
      read_character_tokens(model);
    }
    read_merges(element_at(model, value, "merges"), model.at("merges").where());
    file_.ignore_merges = flag_or(model, "ignore_merges", false);
  }

  // Files of old versions of tokenizers name no type; those with merges are BPE.
  static void check_model_type(const JsonObject& model, const JsonValue& value) {
    if (const std::optional<JsonValue> type = model.find("type")) {
      if (type->string() != "BPE") refuse_value(*type, type->string(), "\"BPE\"");
      return;
    }
    require(
        model.find("vocab") && model.find("merges"), ErrorKind::unsupported,
        "{} has no key \"type\", and without \"vocab\" and \"merges\" it is no BPE model, which "
        "is not supported; supported: \"BPE\"",
        value.where());
  }

  static void check_model_options(const JsonObject& model) {
    if (const auto dropout = model.find_non_null("dropout")) {
      if (dropout->number({0, 1}) != 0) {
        fail(ErrorKind::unsupported, "{} is not supported: set it to null or 0", dropout->where());
      }
    }
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      const auto affix = model.find_non_null(key);
      if (affix && !affix->string().empty()) refuse_value(*affix, affix->string(), "null or \"\"");
    }
  }

  void read_vocabulary(const JsonObject& vocabulary, const std::string& where) {
    const std::size_t size = vocabulary.members().size();
    require(size > 0, ErrorKind::malformed, "{} is empty; expected at least one token", where);
    std::vector<bool> taken(size);
    file_.vocabulary.resize(size);
    file_.model_vocabulary_size = size;
    for (const JsonObject::Member& member : vocabulary.members()) {
      std::int64_t id = -1;
      if (member.second.get_int64().get(id) != simdjson::SUCCESS || id < 0 ||
          id >= static_cast<std::int64_t>(size) || taken[id]) {
        fail_id(vocabulary.value_of(member), static_cast<std::int64_t>(size));
      }
      taken[id] = true;
      file_.vocabulary[id] = member.first;
    }
    file_.ids.reserve(size);
    for (std::size_t id = 0; id < size; ++id) file_.ids.insert(static_cast<TokenId>(id));
  }

  [[noreturn]] void fail_id(const JsonValue& value, std::int64_t size) const {
    const std::int64_t id = value.integer({0, size - 1});
    fail(ErrorKind::malformed,
         "{} must be an id of its own, found {}, which {} has too; expected each of 0 to {} once",
         value.where(), id, quote(file_.vocabulary[id]), size - 1);
  }

  // What becomes of characters that are no token.
  void read_character_tokens(const JsonObject& model) {
    CharacterTokens characters;
    characters.byte_fallback = flag_or(model, "byte_fallback", false);
    characters.fuse_unk = flag_or(model, "fuse_unk", false);
    if (const auto unk_token = model.find_non_null("unk_token")) {
      characters.unk = file_.ids.find(unk_token->string());
      if (!characters.unk) unk_token->fail_expected("a token of the vocabulary");
    }
    file_.characters = characters;
  }

  // Without an unk_token tokenizers leaves out bytes that the vocabulary does not know; with one,
  // or with byte_fallback, it puts that in their place. Byte-level trainers write the whole
  // alphabet, so such files are refused.
  void check_alphabet(const JsonObject& model) const {
    const std::optional<JsonValue> unk_token = model.find_non_null("unk_token");
    const std::optional<JsonValue> fallback = model.find_non_null("byte_fallback");
    const bool falls_back = fallback && fallback->boolean();
    if (!unk_token && !falls_back) return;
    const JsonValue& cause = unk_token ? *unk_token : *fallback;
    for (int byte = 0; byte < 256; ++byte) {
      if (file_.ids.find(spell_byte(static_cast<unsigned char>(byte)))) continue;
      fail(ErrorKind::unsupported,
           "{} is {}, but the vocabulary has no token for the byte 0x{:02X}; supported: null, or a "
           "vocabulary with a token for each of the 256 bytes",
           cause.where(), unk_token ? quote(unk_token->string()) : "true", byte);
    }
  }

  void read_merges(const Element& merges, const std::string& where) {
    simdjson::dom::array list;
    if (merges.get_array().get(list) != simdjson::SUCCESS) {
      JsonValue(merges, where).fail_expected("a list of merges");
    }
    std::size_t index = 0;
    for (const Element merge : list) read_merge(merge, where, index++);
  }

  void read_merge(const Element& merge, const std::string& where, std::size_t index) {
    const auto place = [&] { return JsonValue(merge, fmt::format("{}[{}]", where, index)); };
    std::string_view left, right;
    if (is_version_line(merge)) return;
    if (!split_merge(merge, left, right)) {
      place().fail_expected(R"(two tokens, as "a b" or ["a", "b"])");
    }
    const auto id_of = [&](std::string_view token) {
      const std::optional<TokenId> id = file_.ids.find(token);
      if (id) return *id;
      place().fail_expected(fmt::format(
          "two tokens that give a third, but {} is not in the vocabulary", quote(token)));
    };
    joined_.assign(left).append(right);
    file_.merges.push_back({id_of(left), id_of(right), id_of(joined_)});
  }

  // The first line of a merges.txt, which tokenizers skips in a list of strings.
  static bool is_version_line(const Element& merge) {
    std::string_view text;
    return merge.get_string().get(text) == simdjson::SUCCESS && text.starts_with("#version");
  }

  static bool split_merge(const Element& merge, std::string_view& left, std::string_view& right) {
    std::string_view text;
    if (merge.get_string().get(text) == simdjson::SUCCESS) {
      const std::size_t space = text.find(' ');
      if (space == text.npos || text.find(' ', space + 1) != text.npos) return false;
      left = text.substr(0, space);
      right = text.substr(space + 1);
      return true;
    }
    simdjson::dom::array pair;
    return merge.get_array().get(pair) == simdjson::SUCCESS && pair.size() == 2 &&
           pair.at(0).get_string().get(left) == simdjson::SUCCESS &&
           pair.at(1).get_string().get(right) == simdjson::SUCCESS;
  }

  // --- added tokens ---

  void read_added_tokens() {
    const std::optional<JsonValue> list = top_.find_non_null("added_tokens");
    if (!list) return;
    std::vector<bool> seen;
    for (const JsonValue& value : list->array()) {
      AddedToken token = read_added_token(value);
      seen.resize(file_.vocabulary.size());
      require(!seen[token.id], ErrorKind::malformed,
              "{}: {} stands in the list twice; expected once", value.where(),
              quote(token.content));
      seen[token.id] = true;
      file_.added_tokens.push_back(std::move(token));
    }
  }

  AddedToken read_added_token(const JsonValue& value) {
    const JsonObject object(value);
    AddedToken token;
    const JsonValue content = object.at("content");
    token.content = content.string();
    if (token.content.empty()) content.fail_expected("a text that is not empty");
    token.id = static_cast<TokenId>(object.at("id").integer(kTokenIdRange));
    token.single_word = object.at("single_word").boolean();
    token.lstrip = object.at("lstrip").boolean();
    token.rstrip = object.at("rstrip").boolean();
    token.normalized = object.at("normalized").boolean();
    token.special = object.at("special").boolean();

    std::optional<TokenId> id = file_.ids.find(token.content);
    if (!id) {
      id = static_cast<TokenId>(file_.vocabulary.size());
      file_.vocabulary.push_back(token.content);
      file_.ids.insert(*id);
    }
    require(token.id == *id, ErrorKind::malformed,
            "{} must be {}, the id that {} has in the vocabulary or the next free one, found {}",
            object.at("id").where(), *id, quote(token.content), token.id);
    return token;
  }

  // --- normalizer, pre-tokenizer, decoder, post-processor ---

  void read_pipeline() {
    if (const auto normalizer = top_.find_non_null("normalizer")) {
      file_.normalizer = read_normalizer(*normalizer);
    }
    if (const auto pre_tokenizer = top_.find_non_null("pre_tokenizer")) {
      file_.pre_tokenizer = read_pre_tokenizer(*pre_tokenizer);
    }
    // tokenizers looks at where a piece was before normalization; here it is the first piece.
    require(!(prefixes_first(file_.pre_tokenizer) && takes_beginnings(file_.normalizer)),
            ErrorKind::unsupported,
            "{}: \"pre_tokenizer\" has a \"prepend_scheme\" of \"first\" behind a \"normalizer\" "
            "that may take away a text's beginning, which is not supported; supported there: "
            "\"always\" or \"never\"",
            root_.where());
    const std::optional<JsonValue> decoder = top_.find_non_null("decoder");
    require(decoder.has_value(), ErrorKind::unsupported,
            "{}: \"decoder\" is null or missing, which is not supported; supported: "
            "\"ByteLevel\", or a \"Sequence\" for text that is not byte-level",
            root_.where());
    file_.decoder = read_decoder(*decoder);
    require(file_.decoder.is_byte_level == file_.is_byte_level(), ErrorKind::unsupported,
            "{}: \"pre_tokenizer\" {} \"ByteLevel\" and \"decoder\" {}, which is not supported; "
            "supported: both or neither",
            root_.where(), file_.is_byte_level() ? "ends with" : "is without",
            file_.decoder.is_byte_level ? "has it" : "has not");
  }

  void read_processor(const JsonValue& value) {
    const JsonObject processor(value);
    const JsonValue type = processor.at("type");
    if (type.string() == "ByteLevel") return;  // moves offsets, which are not computed here
    if (type.string() == "Sequence") {
      for (const JsonValue& part : processor.at("processors").array()) read_processor(part);
    } else if (type.string() == "TemplateProcessing") {
      require(file_.post_processing.empty(), ErrorKind::unsupported,
              "{}: a second TemplateProcessing is not supported; supported: one", value.where());
      read_template(processor);
    } else {
      refuse_value(type, type.string(),
                   "null, \"ByteLevel\", \"TemplateProcessing\" or a \"Sequence\" of them");
    }
  }

  void read_template(const JsonObject& processor) {
    const JsonObject special_tokens(processor.at("special_tokens"));
    const JsonValue single = processor.at("single");
    for (const JsonValue& value : single.array()) {
      const JsonObject piece(value);
      if (const auto sequence = piece.find("Sequence")) {
        const JsonValue id = JsonObject(*sequence).at("id");
        if (id.string() != "A") refuse_value(id, id.string(), "\"A\"");
        file_.post_processing.push_back({true, {}});
      } else if (const auto special = piece.find("SpecialToken")) {
        const JsonValue id = JsonObject(*special).at("id");
        const JsonObject token(special_tokens.at(id.string()));
        file_.post_processing.push_back({false, read_ids(token.at("ids"))});
      } else {
        value.fail_expected("an object with the key \"Sequence\" or \"SpecialToken\"");
      }
    }
    if (file_.post_processing.empty()) single.fail_expected("a list that is not empty");
  }

  std::vector<TokenId> read_ids(const JsonValue& list) const {
    const IntegerRange range{0, static_cast<std::int64_t>(file_.vocabulary.size()) - 1};
    std::vector<TokenId> ids;
    for (const JsonValue& id : list.array()) ids.push_back(static_cast<TokenId>(id.integer(range)));
    return ids;
  }

  const JsonValue root_;
  const JsonObject top_;
  TokenizerFile& file_;
  std::string joined_;  // of the two sides of a merge; kept to keep its memory
};

}  // namespace

bool TokenizerFile::adds_prefix_space() const noexcept {
  for (const NormalizerStep& step : normalizer) {
    if (std::holds_alternative<Prepend>(step)) return true;
  }
  for (const PreTokenizerStep& step : pre_tokenizer.steps()) {
    const auto* byte_level = std::get_if<ByteLevel>(&step);
    const auto* metaspace = std::get_if<Metaspace>(&step);
    if (byte_level && byte_level->add_prefix_space) return true;
    if (metaspace && metaspace->prefix != Metaspace::Prefix::never) return true;
  }
  return false;
}

std::unique_ptr<const TokenizerFile> read_tokenizer_file(std::string_view json,
                                                         const std::string& name) {
  const JsonDocument document(json, name);
  auto file = std::make_unique<TokenizerFile>();
  Reader(document.root(), *file).read();
  return file;
}

}  // namespace clusterfusion
