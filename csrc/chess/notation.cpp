#include "chess/notation.h"

namespace llmc::chess {
namespace {

bool is_file(char c) { return c >= 'a' && c <= 'h'; }
bool is_rank(char c) { return c >= '1' && c <= '8'; }
bool is_square(std::string_view text) { return text.size() == 2 && is_file(text[0]) && is_rank(text[1]); }
Square square_of(std::string_view text) { return 8 * (text[1] - '1') + (text[0] - 'a'); }

// What some programs write for a move that is passed over, which no rule allows.
bool is_null_move(std::string_view text) { return text == NULL_MOVE || text == "--" || text == "Z0"; }

Reading accept_if_legal(Move candidate, const Board& board, Move* move) {
  if (!board.is_legal(candidate)) return Reading::Illegal;
  *move = candidate;
  return Reading::Ok;
}

Reading castle(int files, const Board& board, Move* move) {
  const Square king = __builtin_ctzll(board.pieces(board.turn(), King));
  const Square to = king + files;
  // From elsewhere the sum could leave the board.
  const bool at_home = king == (board.turn() == White ? 4 : 60);
  return at_home ? accept_if_legal({king, to}, board, move) : Reading::Illegal;
}

}  // namespace

Piece promotion_piece(char letter) {
  switch (letter) {
    case 'Q':
    case 'q':
      return Queen;
    case 'B':
    case 'b':
      return Bishop;
    case 'R':
    case 'r':
      return Rook;
    case 'N':
    case 'n':
      return Knight;
    default:
      return NoPiece;
  }
}

std::string to_uci(Move move) {
  std::string text;
  for (const Square square : {move.from, move.to}) {
    text += char('a' + square % 8);
    text += char('1' + square / 8);
  }
  if (move.promotion != NoPiece) text += "pnbrqk"[move.promotion];
  return text;
}

Reading read_uci(std::string_view text, const Board& board, Move* move) {
  if (is_null_move(text)) return Reading::Illegal;
  const bool promotes = text.size() == 5;
  if (text.size() < 4 || text.size() > 5 || !is_square(text.substr(0, 2)) || !is_square(text.substr(2, 2)) ||
      (promotes && promotion_piece(text[4]) == NoPiece)) {
    return Reading::Unreadable;
  }
  const Piece promotion = promotes ? promotion_piece(text[4]) : NoPiece;
  return accept_if_legal({square_of(text.substr(0, 2)), square_of(text.substr(2, 2)), promotion}, board, move);
}

Reading read_san(std::string_view text, const Board& board, Move* move) {
  while (!text.empty() && std::string_view("+#!?").find(text.back()) != std::string_view::npos) text.remove_suffix(1);
  if (text.size() > 4 && text.substr(text.size() - 4) == "e.p.") text.remove_suffix(4);
  if (is_null_move(text)) return Reading::Illegal;
  if (text == "O-O" || text == "0-0") return castle(2, board, move);
  if (text == "O-O-O" || text == "0-0-0") return castle(-2, board, move);

  Piece promotion = NoPiece;
  if (text.size() > 2 && !is_rank(text.back())) {  // every other move ends with the rank of its square
    promotion = promotion_piece(text.back());
    if (promotion == NoPiece) return Reading::Unreadable;
    text.remove_suffix(1);
    if (text.back() == '=') text.remove_suffix(1);
  }
  if (text.size() < 2 || !is_square(text.substr(text.size() - 2))) return Reading::Unreadable;
  const Square to = square_of(text.substr(text.size() - 2));
  text.remove_suffix(2);

  const size_t letter = text.empty() ? std::string_view::npos : std::string_view("PNBRQK").find(text[0]);
  const Piece piece = letter == std::string_view::npos ? Pawn : Piece(letter);
  if (letter != std::string_view::npos) text.remove_prefix(1);
  if (!text.empty() && (text.back() == 'x' || text.back() == '-')) text.remove_suffix(1);
  int file = -1, rank = -1;
  if (!text.empty() && is_file(text[0])) {
    file = text[0] - 'a';
    text.remove_prefix(1);
  }
  if (!text.empty() && is_rank(text[0])) {
    rank = text[0] - '1';
    text.remove_prefix(1);
  }
  if (!text.empty()) return Reading::Unreadable;
  if (piece == Pawn && file < 0) file = to % 8;  // captures name the file

  int found = 0;
  for (Bitboard rest = board.pieces(board.turn(), piece); rest; rest &= rest - 1) {
    const Square from = __builtin_ctzll(rest);
    const bool meant = (file < 0 || file == from % 8) && (rank < 0 || rank == from / 8);
    if (meant && accept_if_legal({from, to, promotion}, board, move) == Reading::Ok) found++;
  }
  return found == 0 ? Reading::Illegal : found == 1 ? Reading::Ok : Reading::Ambiguous;
}

}  // namespace llmc::chess
