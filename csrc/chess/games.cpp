#include "chess/games.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "chess/notation.h"
#include "chess/tokens.h"

namespace llmc::chess {
namespace {

bool is_blank(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool starts_with(std::string_view text, std::string_view start) { return text.substr(0, start.size()) == start; }

// One game in the making.
class Game {
 public:
  explicit Game(const Filter& filter) : filter_(filter) {}

  bool is_dropped() const { return fate_ != Fate::Kept; }
  void drop(Fate fate) {
    if (!is_dropped()) fate_ = fate;
  }

  template <typename Read>
  void play(Read read, std::string_view text) {
    if (is_dropped()) return;
    Move move;
    switch (read(text, board_, &move)) {
      case Reading::Ok:
        board_.make(move);
        append(tokens_, move);
        plies_++;
        promotes_ = promotes_ || move.promotion != NoPiece;
        return;
      case Reading::Unreadable:
        return drop(Fate::Unreadable);
      case Reading::Illegal:
        return drop(Fate::Illegal);
      case Reading::Ambiguous:
        return drop(Fate::Ambiguous);
    }
  }

  void add_to(Games& games) {
    if (plies_ < std::max(filter_.min_plies, 1)) drop(Fate::TooShort);
    if (filter_.promotions && !promotes_) drop(Fate::NoPromotion);
    games.counts[size_t(fate_)]++;
    if (!is_dropped()) games.tokens.insert(games.tokens.end(), tokens_.begin(), tokens_.end());
  }

 private:
  const Filter& filter_;
  Board board_;
  std::vector<uint16_t> tokens_ = {END_OF_TEXT};
  int plies_ = 0;
  bool promotes_ = false;
  Fate fate_ = Fate::Kept;
};

std::optional<int> read_number(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() ? std::optional(value) : std::nullopt;
}

// Lichess's class of a tag such as "180+2" or, without increment, "300". Nothing for other forms.
std::string_view time_class(std::string_view control) {
  if (control == "-") return "correspondence";
  const size_t plus = std::min(control.find('+'), control.size());
  const std::optional<int> seconds = read_number(control.substr(0, plus));
  const std::optional<int> increment = plus < control.size() ? read_number(control.substr(plus + 1)) : 0;
  if (!seconds || !increment) return {};
  const int64_t expected = *seconds + int64_t(40) * *increment;
  for (const TimeClass& entry : TIME_CLASSES) {
    if (expected < entry.below) return entry.name;
  }
  return {};
}

// The tags of a game that the filter looks at.
struct Tags {
  std::string_view event, white_elo, black_elo, time_control, variant, fen;

  std::optional<Fate> reason_to_drop(const Filter& filter) const {
    const bool standard = variant.empty() || variant == "Standard" || variant == "standard" || variant == "Chess";
    if (!standard || !(fen.empty() || fen == START_FEN)) return Fate::NotStandard;
    if (filter.rated && !starts_with(event, "Rated")) return Fate::NotRated;
    for (const std::string_view elo : {white_elo, black_elo}) {
      const std::optional<int> value = read_number(elo);
      if (filter.min_elo > 0 && !(value && *value >= filter.min_elo)) return Fate::Elo;
      if (filter.max_elo > 0 && !(value && *value <= filter.max_elo)) return Fate::Elo;
    }
    const std::string& control = filter.time_control;
    if (!control.empty() && control != time_control && control != time_class(time_control)) return Fate::TimeControl;
    return std::nullopt;
  }

  std::string_view* find(std::string_view name) {
    const std::pair<std::string_view, std::string_view*> known[] = {
        {"Event", &event},        {"WhiteElo", &white_elo},
        {"BlackElo", &black_elo}, {"TimeControl", &time_control},
        {"Variant", &variant},    {"FEN", &fen},
    };
    for (const auto& [key, value] : known) {
      if (key == name) return value;
    }
    return nullptr;
  }
};

class PgnReader {
 public:
  PgnReader(std::string_view text, const Filter& filter, Games& games) : text_(text), filter_(filter), games_(games) {}

  void read_all() {
    while (skip_between_games()) {
      Game game(filter_);
      read_tags(game);
      read_moves(game);
      game.add_to(games_);
    }
  }

 private:
  bool at_end() const { return at_ >= text_.size(); }
  bool at_line_start() const { return at_ == 0 || text_[at_ - 1] == '\n'; }
  void skip_line() { at_ = std::min(text_.find('\n', at_), text_.size()); }

  // Skips blanks, lines that begin with % and comments to the end of a line. False at the end of the text.
  bool skip_blanks() {
    for (; !at_end(); at_++) {
      if ((text_[at_] == '%' && at_line_start()) || text_[at_] == ';') {
        skip_line();
        if (at_end()) break;
      } else if (!is_blank(text_[at_])) {
        return true;
      }
    }
    return false;
  }

  // Skips a comment in braces. False if it never ends.
  bool skip_comment() {
    at_ = text_.find('}', at_);
    if (at_end()) return false;
    at_++;
    return true;
  }

  bool skip_between_games() {
    while (skip_blanks()) {
      if (text_[at_] != '{') return true;
      if (!skip_comment()) return false;
    }
    return false;
  }

  // Lines such as [Event "Rated Blitz game"]; in a value, \ stands before " and \.
  void read_tags(Game& game) {
    Tags tags;
    while (skip_blanks() && text_[at_] == '[') {
      // Nothing is looked for beyond the line: that would take quadratic time.
      const std::string_view line = text_.substr(at_, text_.find('\n', at_) - at_);
      const size_t name_end = std::min(line.find_first_of(" \t\""), line.size());
      const size_t begin = std::min(line.find('"', name_end), line.size()) + 1;
      size_t end = begin;
      while (end < line.size() && line[end] != '"') end += line[end] == '\\' ? 2 : 1;
      if (end >= line.size()) {
        game.drop(Fate::Unreadable);
        at_ += line.size();
        continue;
      }
      if (std::string_view* value = tags.find(line.substr(1, name_end - 1))) *value = line.substr(begin, end - begin);
      at_ += std::min(line.find(']', end), line.size() - 1) + 1;
    }
    if (const std::optional<Fate> fate = tags.reason_to_drop(filter_)) game.drop(*fate);
  }

  // From the first move to the result, or to where the game ends without one.
  void read_moves(Game& game) {
    int variations = 0;  // open parentheses
    while (skip_blanks()) {
      switch (text_[at_]) {
        case '{':
          if (!skip_comment()) game.drop(Fate::Unreadable);
          continue;
        case '(':
          variations++;
          at_++;
          continue;
        case ')':
          if (--variations < 0) game.drop(Fate::Unreadable);
          at_++;
          continue;
        case '*':
          at_++;
          if (variations <= 0) return;
          continue;
        case '[':
          if (!at_line_start()) break;
          game.drop(variations > 0 ? Fate::Unreadable : Fate::NoResult);
          return;
      }
      const size_t begin = at_++;
      while (!at_end() && !is_blank(text_[at_]) &&
             std::string_view("{}();$*").find(text_[at_]) == std::string_view::npos) {
        at_++;
      }
      const std::string_view word = text_.substr(begin, at_ - begin);
      if (variations <= 0 && (word == "1-0" || word == "0-1" || word == "1/2-1/2")) return;
      if (variations <= 0) read_word(word, game);
    }
    game.drop(variations > 0 ? Fate::Unreadable : Fate::NoResult);
  }

  // A move, a move number, both ("12.e4", "12...e5"), or an annotation.
  static void read_word(std::string_view word, Game& game) {
    if (is_digit(word[0]) && !starts_with(word, "0-0") && !starts_with(word, NULL_MOVE)) {
      const size_t dot = word.find_first_not_of("0123456789");
      if (dot == std::string_view::npos) return;
      if (word[dot] != '.') return game.drop(Fate::Unreadable);
      word.remove_prefix(dot);
    }
    word.remove_prefix(std::min(word.find_first_not_of('.'), word.size()));
    const bool is_annotation =
        word.find_first_not_of("!?") == std::string_view::npos || word[0] == '$' || word == "e.p.";
    if (!is_annotation) game.play(read_san, word);
  }

  std::string_view text_;
  size_t at_ = 0;
  const Filter& filter_;
  Games& games_;
};

}  // namespace

Games encode_pgn(std::string_view text, const Filter& filter) {
  Games games;
  if (starts_with(text, "\xEF\xBB\xBF")) text.remove_prefix(3);
  while (!text.empty()) {
    const size_t next = text.find("\n[Event ");
    const size_t end = next == std::string_view::npos ? text.size() : next + 1;
    PgnReader(text.substr(0, end), filter, games).read_all();
    text.remove_prefix(end);
  }
  return games;
}

Games encode_uci(std::string_view text, const Filter& filter) {
  Games games;
  while (!text.empty()) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    std::optional<Game> game;
    while (true) {
      line.remove_prefix(size_t(std::find_if_not(line.begin(), line.end(), is_blank) - line.begin()));
      if (line.empty()) break;
      const std::string_view word =
          line.substr(0, size_t(std::find_if(line.begin(), line.end(), is_blank) - line.begin()));
      line.remove_prefix(word.size());
      if (!game) game.emplace(filter);
      game->play(read_uci, word);
    }
    if (game) game->add_to(games);
  }
  return games;
}

}  // namespace llmc::chess
