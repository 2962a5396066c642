// Moves as text: UCI ("e7e8q") and the short algebraic notation of PGN files ("exd8=Q+").
#pragma once

#include <string>
#include <string_view>

#include "chess/board.h"

namespace llmc::chess {

constexpr std::string_view NULL_MOVE = "0000";  // in UCI's notation

enum class Reading { Ok, Unreadable, Illegal, Ambiguous };

// Q, B, R or N in either case; NoPiece for any other letter.
Piece promotion_piece(char letter);

std::string to_uci(Move move);

// Both write the move to *move if the result is Ok, and the move is then legal. A null move ("0000", "--", "Z0") is Illegal.
Reading read_uci(std::string_view text, const Board& board, Move* move);

// Takes castling with O or 0, promotions with or without "=", more of the from-square than is needed, a hyphen for a move
// that takes nothing, and ends such as "+", "#", "!?" and "e.p."; whether a move takes or checks is not compared.
Reading read_san(std::string_view text, const Board& board, Move* move);

}  // namespace llmc::chess
