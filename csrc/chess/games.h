// From files of games to tokens: PGN and lines of UCI moves, every move checked against the rules.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace llmc::chess {

// What became of a game: kept, or the first reason to drop it in this order.
enum class Fate {
  Kept,
  NotStandard,
  NotRated,
  Elo,
  TimeControl,
  Unreadable,
  Illegal,
  Ambiguous,
  NoResult,
  TooShort,
  NoPromotion
};
constexpr std::array FATES = {"kept",         "not standard chess", "not rated",    "Elo rating",
                              "time control", "unreadable",         "illegal move", "ambiguous move",
                              "no result",    "too short",          "no promotion"};

struct Filter {
  bool rated = false;        // the tag Event begins with "Rated", as Lichess writes it
  int min_elo = 0;           // of both players; 0: any, also unknown
  int max_elo = 0;           // of both players; 0: any, also unknown
  std::string time_control;  // the tag's text, such as "600+0", or one of TIME_CLASSES; empty: any
  int min_plies = 1;         // moves of both together
  bool promotions = false;   // only games in which a pawn promotes
};

// Lichess's names for the time that a game may take, and the seconds below which a game is of that class: those at the
// start and 40 times those added for each move. "correspondence" has the tag "-".
struct TimeClass {
  std::string_view name;
  int below;
};
constexpr std::array<TimeClass, 5> TIME_CLASSES = {
    {{"ultrabullet", 30}, {"bullet", 180}, {"blitz", 480}, {"rapid", 1500}, {"classical", INT32_MAX}}};

struct Games {
  std::vector<uint16_t> tokens;  // of each game that is kept: end-of-text, then its moves
  std::array<int64_t, FATES.size()> counts{};
};

// Games in PGN: tags, moves, comments, variations, annotations. A game ends with its result; one without a result is
// dropped, so what an interrupted download cut off does no harm. What is wrong in one game, an open comment say, ends where
// a line begins with the next tag Event.
Games encode_pgn(std::string_view text, const Filter& filter);

// Games of one line each, moves in UCI separated by blanks; empty lines are skipped. Of the filter only min_plies and
// promotions apply.
Games encode_uci(std::string_view text, const Filter& filter);

}  // namespace llmc::chess
