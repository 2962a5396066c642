// The 72 tokens of the chess models, and games made of them.
#pragma once

#include <cstdint>
#include <vector>

#include "chess/board.h"

namespace llmc::chess {

// 0 to 3 are pad, start of text, end of text, unknown; then the squares a1, b1, ..., h8; then Q, B, R, N.
constexpr uint16_t END_OF_TEXT = 2;
constexpr uint16_t FIRST_SQUARE = 4;
constexpr uint16_t FIRST_PROMOTION = 68;

// A move is its two squares and, of a promotion, the piece.
void append(std::vector<uint16_t>& tokens, Move move);

struct Replay {
  std::vector<Move> moves;
  size_t used = 0;  // tokens that these moves took
  Board board;      // after them
};

// Plays a game from its start up to the first tokens that are no legal move.
Replay replay(const std::vector<int64_t>& tokens);

}  // namespace llmc::chess
