#include "chess/tokens.h"

#include <algorithm>
#include <array>

namespace llmc::chess {
namespace {

constexpr std::array PROMOTIONS = {Queen, Bishop, Rook, Knight};

bool is_square(int64_t token) { return token >= FIRST_SQUARE && token < FIRST_SQUARE + 64; }

bool is_promotion(int64_t token) {
  return token >= FIRST_PROMOTION && token < FIRST_PROMOTION + int64_t(PROMOTIONS.size());
}

}  // namespace

void append(std::vector<uint16_t>& tokens, Move move) {
  tokens.push_back(uint16_t(FIRST_SQUARE + move.from));
  tokens.push_back(uint16_t(FIRST_SQUARE + move.to));
  if (move.promotion == NoPiece) return;
  const auto* piece = std::find(PROMOTIONS.begin(), PROMOTIONS.end(), move.promotion);
  tokens.push_back(uint16_t(FIRST_PROMOTION + (piece - PROMOTIONS.begin())));
}

Replay replay(const std::vector<int64_t>& tokens) {
  Replay result;
  while (result.used + 2 <= tokens.size()) {
    const int64_t* token = &tokens[result.used];
    if (!is_square(token[0]) || !is_square(token[1])) break;
    Move move{Square(token[0] - FIRST_SQUARE), Square(token[1] - FIRST_SQUARE)};
    size_t length = 2;
    if (result.board.is_promotion(move.from, move.to)) {
      length = 3;
      if (result.used + length > tokens.size() || !is_promotion(token[2])) break;
      move.promotion = PROMOTIONS[size_t(token[2] - FIRST_PROMOTION)];
    }
    if (!result.board.is_legal(move)) break;
    result.board.make(move);
    result.moves.push_back(move);
    result.used += length;
  }
  return result;
}

}  // namespace llmc::chess
