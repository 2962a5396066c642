// The rules of chess and the readers of games, for native.py: with sanitizers, and counting which code has run.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "chess/board.h"
#include "chess/games.h"
#include "chess/notation.h"
#include "chess/tokens.h"
#include "core/check.h"

namespace {

constexpr size_t COUNTERS = 1 << 14;
std::array<uint8_t, COUNTERS> counters;

using namespace llmc::chess;

void require(bool holds) {
  if (!holds) std::abort();
}

// Every game that is kept must play back to its last token.
void check_games(const Games& games) {
  std::vector<int64_t> game;
  for (size_t i = 0; i <= games.tokens.size(); i++) {
    if (i < games.tokens.size() && games.tokens[i] != END_OF_TEXT) {
      game.push_back(games.tokens[i]);
    } else if (!game.empty()) {
      require(replay(game).used == game.size());
      game.clear();
    }
  }
}

void check_squares(const Board& board) {
  for (Square square = 0; square < 64; square++) {
    int pieces = 0;
    for (const Color color : {White, Black}) {
      for (const Piece piece : {Pawn, Knight, Bishop, Rook, Queen, King}) {
        pieces += board.pieces(color, piece) >> square & 1;
      }
    }
    require(pieces == (board.piece_at(square) != NoPiece));
  }
}

// A position that is accepted stays one with every legal move.
void check_moves(const Board& board) {
  for (const Move move : board.legal_moves()) {
    require(board.is_legal(move));
    Board after = board;
    after.make(move);
    check_squares(after);
    const std::string fen = after.fen();
    require(Board(fen).fen() == fen);
  }
}

// A position and, on the next line, a move as text.
void check_position(std::string_view text) {
  const size_t end = std::min(text.find('\n'), text.size());
  const Board board{text.substr(0, end)};
  try {
    check_moves(board);
    board.state();
    const std::string_view move = text.substr(std::min(end + 1, text.size()));
    for (const auto read : {read_san, read_uci}) {
      Move found;
      require(read(move, board, &found) != Reading::Ok || board.is_legal(found));
    }
  } catch (const llmc::Error&) {  // only the position itself may be refused
    std::abort();
  }
}

}  // namespace

// The compiler calls it at the beginning of each piece of code without branches.
extern "C" void __sanitizer_cov_trace_pc() {
  const auto place = uintptr_t(__builtin_return_address(0));
  counters[(place >> 2) % COUNTERS]++;
}

extern "C" uint8_t* counters_begin() { return counters.data(); }
extern "C" uint8_t* counters_end() { return counters.data() + COUNTERS; }

extern "C" void read_games(const char* data, size_t size, int format) {
  const std::string_view text(data, size);
  try {
    switch (format) {
      case 0:
        return check_games(encode_pgn(text, {}));
      case 1:
        return check_games(encode_uci(text, {}));
      case 2:
        return check_position(text);
      default:
        replay(std::vector<int64_t>(text.begin(), text.end()));
    }
  } catch (const llmc::Error&) {  // it is refused
  }
}
