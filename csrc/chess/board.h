// Chess: a position and the rules. Squares are 0 (a1), 1 (b1), ..., 63 (h8); a bitboard has one bit per square.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace llmc::chess {

using Bitboard = uint64_t;
using Square = int;

enum Color : uint8_t { White, Black };
enum Piece : uint8_t { Pawn, Knight, Bishop, Rook, Queen, King, NoPiece };
enum class State { Ongoing, Checkmate, Stalemate, InsufficientMaterial };

constexpr std::string_view START_FEN = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1";

// Castling is written as the king's move.
struct Move {
  Square from;
  Square to;
  Piece promotion = NoPiece;
};

class Board {
 public:
  // Throws Error for a position that is not described in full or that no game can reach as simply as that: kings,
  // pawns on the first or last rank, castling rights without king or rook, the side that has moved left in check.
  // The two counters at the end may be left out.
  explicit Board(std::string_view fen = START_FEN);

  // The en-passant square is written only where a pawn can legally capture on it.
  std::string fen() const;

  Color turn() const { return turn_; }
  Piece piece_at(Square square) const;
  Bitboard pieces(Color color, Piece piece) const { return colors_[color] & pieces_[piece]; }
  bool is_promotion(Square from, Square to) const;  // of a pawn that goes there

  bool is_legal(Move move) const;
  std::vector<Move> legal_moves() const;
  void make(Move move);  // which must be legal
  bool in_check() const { return is_attacked(king(turn_), opponent()); }
  State state() const;

 private:
  Color opponent() const { return Color(turn_ ^ 1); }
  Square king(Color color) const;
  Bitboard targets(Square from) const;
  Bitboard castling_targets() const;
  bool is_attacked(Square square, Color by) const;
  bool leaves_king_safe(Move move) const;
  bool insufficient_material() const;
  void read_placement(std::string_view field);
  void check_castling() const;

  std::array<Bitboard, 6> pieces_{};  // of both colours
  std::array<Bitboard, 2> colors_{};
  Bitboard castling_ = 0;    // the corners whose rook can still castle
  Bitboard en_passant_ = 0;  // the square that the pawn of the last move jumped over
  Color turn_ = White;
  int halfmove_clock_ = 0;  // moves of both since the last capture or pawn move
  int move_number_ = 1;
};

// Leaf nodes of the tree of legal moves: the published test of move generators.
int64_t perft(const Board& board, int depth);

}  // namespace llmc::chess
