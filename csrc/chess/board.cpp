#include "chess/board.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "core/check.h"

namespace llmc::chess {
namespace {

constexpr std::string_view LETTERS = "PNBRQKpnbrqk";
constexpr int MAX_COUNTER = 1'000'000;  // where counting ends: the longest possible game has some thousand moves
constexpr Bitboard DARK_SQUARES = 0xAA55AA55AA55AA55;
constexpr int ROOK_STEPS[][2] = {{1, 0}, {-1, 0}, {0, 1}, {0, -1}};
constexpr int BISHOP_STEPS[][2] = {{1, 1}, {1, -1}, {-1, 1}, {-1, -1}};
constexpr int KNIGHT_STEPS[][2] = {{1, 2}, {2, 1}, {2, -1}, {1, -2}, {-1, -2}, {-2, -1}, {-2, 1}, {-1, 2}};
constexpr int KING_STEPS[][2] = {{1, 0}, {1, 1}, {0, 1}, {-1, 1}, {-1, 0}, {-1, -1}, {0, -1}, {1, -1}};
constexpr int PAWN_STEPS[2][2][2] = {{{-1, 1}, {1, 1}}, {{-1, -1}, {1, -1}}};  // captures, by colour

constexpr Bitboard bit(Square square) { return Bitboard(1) << square; }
constexpr int file_of(Square square) { return square % 8; }
constexpr int rank_of(Square square) { return square / 8; }
constexpr Bitboard rank_mask(int rank) { return Bitboard(0xFF) << (8 * rank); }
constexpr int first_rank(Color color) { return color == White ? 0 : 7; }
Square lowest(Bitboard squares) { return __builtin_ctzll(squares); }
int count(Bitboard squares) { return __builtin_popcountll(squares); }

template <typename Visit>
void for_each(Bitboard squares, Visit visit) {
  for (; squares; squares &= squares - 1) visit(lowest(squares));
}

// The squares that are one of `steps` away.
template <size_t N>
constexpr Bitboard leap(Square from, const int (&steps)[N][2]) {
  Bitboard result = 0;
  for (const auto& step : steps) {
    const int file = file_of(from) + step[0], rank = rank_of(from) + step[1];
    if (file >= 0 && file < 8 && rank >= 0 && rank < 8) result |= bit(8 * rank + file);
  }
  return result;
}

// The squares on the lines of `steps`, each up to and with the first occupied one.
Bitboard slide(Square from, Bitboard occupied, const int (&steps)[4][2]) {
  Bitboard result = 0;
  for (const auto& step : steps) {
    int file = file_of(from) + step[0], rank = rank_of(from) + step[1];
    for (; file >= 0 && file < 8 && rank >= 0 && rank < 8; file += step[0], rank += step[1]) {
      result |= bit(8 * rank + file);
      if (occupied & bit(8 * rank + file)) break;
    }
  }
  return result;
}

struct LeapTables {
  Bitboard knight[64] = {}, king[64] = {}, pawn[2][64] = {};

  constexpr LeapTables() {
    for (Square square = 0; square < 64; square++) {
      knight[square] = leap(square, KNIGHT_STEPS);
      king[square] = leap(square, KING_STEPS);
      pawn[White][square] = leap(square, PAWN_STEPS[White]);
      pawn[Black][square] = leap(square, PAWN_STEPS[Black]);
    }
  }
};
constexpr LeapTables LEAPS;

Bitboard attacks(Piece piece, Square from, Bitboard occupied) {
  switch (piece) {
    case Knight:
      return LEAPS.knight[from];
    case Bishop:
      return slide(from, occupied, BISHOP_STEPS);
    case Rook:
      return slide(from, occupied, ROOK_STEPS);
    case Queen:
      return slide(from, occupied, BISHOP_STEPS) | slide(from, occupied, ROOK_STEPS);
    default:
      return LEAPS.king[from];
  }
}

std::string square_name(Square square) { return {char('a' + file_of(square)), char('1' + rank_of(square))}; }

// Cuts the text before the next space off `rest`.
std::string_view next_field(std::string_view& rest) {
  rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
  const std::string_view field = rest.substr(0, rest.find(' '));
  rest.remove_prefix(field.size());
  return field;
}

// A counter of a FEN; `missing` if it is left out.
int read_counter(std::string_view field, int missing, const char* fen) {
  int value = missing;
  const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value);
  const bool is_number = error == std::errc() && end == field.data() + field.size();
  LLMC_CHECK(field.empty() || (is_number && value >= 0 && value <= MAX_COUNTER),
             "FEN '%s': the last two fields must be numbers from 0 to %d", fen, MAX_COUNTER);
  return value;
}

}  // namespace

Board::Board(std::string_view fen) {
  const std::string text(fen);
  std::string_view rest = fen;
  const std::string_view placement = next_field(rest), turn = next_field(rest), castling = next_field(rest),
                         en_passant = next_field(rest), halfmoves = next_field(rest), number = next_field(rest);
  LLMC_CHECK(!en_passant.empty() && next_field(rest).empty(),
             "FEN '%s': it needs 4 fields (pieces, side to move, castling, en passant), and may have 2 counters",
             text.c_str());
  read_placement(placement);
  LLMC_CHECK(turn == "w" || turn == "b", "FEN '%s': the side to move must be w or b", text.c_str());
  turn_ = turn == "w" ? White : Black;
  for (const char c : castling == "-" ? std::string_view() : castling) {
    const size_t corner = std::string_view("QKqk").find(c);
    LLMC_CHECK(corner != std::string_view::npos, "FEN '%s': castling must be - or some of KQkq", text.c_str());
    castling_ |= bit(std::array{0, 7, 56, 63}[corner]);
  }
  check_castling();
  if (en_passant != "-") {
    const int rank = turn_ == White ? 5 : 2;  // behind it stands the pawn that has just moved
    LLMC_CHECK(en_passant.size() == 2 && en_passant[0] >= 'a' && en_passant[0] <= 'h' && en_passant[1] == '1' + rank,
               "FEN '%s': en passant must be - or a square of rank %d", text.c_str(), rank + 1);
    const Square square = 8 * rank + (en_passant[0] - 'a'), first = square + (turn_ == White ? 8 : -8);
    const bool empty = !((colors_[White] | colors_[Black]) & (bit(square) | bit(first)));
    LLMC_CHECK(empty && (pieces(opponent(), Pawn) & bit(square ^ 8)), "FEN '%s': no pawn has passed over %s",
               text.c_str(), square_name(square).c_str());
    en_passant_ = bit(square);
  }
  halfmove_clock_ = read_counter(halfmoves, 0, text.c_str());
  move_number_ = read_counter(number, 1, text.c_str());
  LLMC_CHECK(!is_attacked(king(opponent()), turn_), "FEN '%s': the side that has moved is in check", text.c_str());
}

void Board::read_placement(std::string_view field) {
  const std::string text(field);
  int file = 0, rank = 7;
  for (const char c : field) {
    const size_t letter = LETTERS.find(c);
    if (c == '/' && file == 8 && rank > 0) {
      file = 0;
      rank--;
    } else if (c >= '1' && c <= '8' - file) {
      file += c - '0';
    } else {
      LLMC_CHECK(letter != std::string_view::npos && file < 8,
                 "FEN '%s': it must be 8 ranks of 8 squares, separated by /", text.c_str());
      const Bitboard square = bit(8 * rank + file++);
      pieces_[letter % 6] |= square;
      colors_[letter / 6] |= square;
    }
  }
  LLMC_CHECK(file == 8 && rank == 0, "FEN '%s': it must be 8 ranks of 8 squares, separated by /", text.c_str());
  LLMC_CHECK(count(pieces(White, King)) == 1 && count(pieces(Black, King)) == 1, "FEN '%s': each side needs one king",
             text.c_str());
  LLMC_CHECK(!(pieces_[Pawn] & (rank_mask(0) | rank_mask(7))), "FEN '%s': a pawn is on the first or last rank",
             text.c_str());
}

void Board::check_castling() const {
  for_each(castling_, [&](Square corner) {
    const Color color = corner < 8 ? White : Black;
    LLMC_CHECK((pieces(color, Rook) & bit(corner)) && king(color) == 8 * rank_of(corner) + 4,
               "FEN: castling with the rook on %s needs it and the king on their first squares",
               square_name(corner).c_str());
  });
}

std::string Board::fen() const {
  std::string text;
  for (int rank = 7; rank >= 0; rank--) {
    int empty = 0;
    for (int file = 0; file < 8; file++) {
      const Square square = 8 * rank + file;
      const Piece piece = piece_at(square);
      if (piece == NoPiece) {
        empty++;
        continue;
      }
      if (empty) text += char('0' + empty);
      empty = 0;
      text += LETTERS[piece + (colors_[Black] & bit(square) ? 6 : 0)];
    }
    if (empty) text += char('0' + empty);
    if (rank > 0) text += '/';
  }
  text += turn_ == White ? " w " : " b ";
  if (!castling_) text += '-';
  for (const auto& [corner, letter] : {std::pair(7, 'K'), {0, 'Q'}, {63, 'k'}, {56, 'q'}}) {
    if (castling_ & bit(corner)) text += letter;
  }
  bool can_capture = false;
  if (en_passant_) {
    const Square to = lowest(en_passant_);
    for_each(LEAPS.pawn[opponent()][to] & pieces(turn_, Pawn),
             [&](Square from) { can_capture = can_capture || is_legal({from, to}); });
  }
  text += " " + (can_capture ? square_name(lowest(en_passant_)) : "-");
  return text + " " + std::to_string(halfmove_clock_) + " " + std::to_string(move_number_);
}

Piece Board::piece_at(Square square) const {
  for (const Piece piece : {Pawn, Knight, Bishop, Rook, Queen, King}) {
    if (pieces_[piece] & bit(square)) return piece;
  }
  return NoPiece;
}

bool Board::is_promotion(Square from, Square to) const {
  return (pieces(turn_, Pawn) & bit(from)) && rank_of(to) == first_rank(opponent());
}

bool Board::is_legal(Move move) const {
  if (!(colors_[turn_] & bit(move.from)) || !(targets(move.from) & bit(move.to))) return false;
  const bool right_promotion = is_promotion(move.from, move.to) ? move.promotion >= Knight && move.promotion <= Queen
                                                                : move.promotion == NoPiece;
  return right_promotion && leaves_king_safe(move);
}

std::vector<Move> Board::legal_moves() const {
  std::vector<Move> moves;
  for_each(colors_[turn_], [&](Square from) {
    for_each(targets(from), [&](Square to) {
      if (!is_promotion(from, to)) {
        if (leaves_king_safe({from, to})) moves.push_back({from, to});
      } else if (leaves_king_safe({from, to, Queen})) {  // the same with every piece: it stands where the pawn would
        for (const Piece piece : {Queen, Bishop, Rook, Knight}) moves.push_back({from, to, piece});
      }
    });
  });
  return moves;
}

void Board::make(Move move) {
  const Bitboard from = bit(move.from), to = bit(move.to);
  const Piece piece = piece_at(move.from);
  // Of an en-passant capture, the pawn stands on the next rank of the same file: 6 -> 5, 3 -> 4.
  const Bitboard victim = (piece == Pawn && to == en_passant_ ? bit(move.to ^ 8) : to) & colors_[opponent()];
  for (Bitboard& pieces : pieces_) pieces &= ~(victim | from);
  colors_[opponent()] &= ~victim;
  pieces_[move.promotion == NoPiece ? piece : move.promotion] |= to;
  colors_[turn_] ^= from | to;
  castling_ &= ~(from | to);
  if (piece == King) {
    castling_ &= ~rank_mask(first_rank(turn_));
    if (std::abs(move.to - move.from) == 2) {
      const Square corner = move.to > move.from ? move.to + 1 : move.to - 2;
      const Bitboard rook = bit(corner) | bit((move.from + move.to) / 2);
      pieces_[Rook] ^= rook;
      colors_[turn_] ^= rook;
    }
  }
  const bool jump = piece == Pawn && std::abs(move.to - move.from) == 16;
  en_passant_ = jump ? bit((move.from + move.to) / 2) : 0;
  halfmove_clock_ = piece == Pawn || victim ? 0 : std::min(halfmove_clock_ + 1, MAX_COUNTER);
  move_number_ = std::min(move_number_ + int(turn_ == Black), MAX_COUNTER);
  turn_ = opponent();
}

State Board::state() const {
  if (legal_moves().empty()) return in_check() ? State::Checkmate : State::Stalemate;
  return insufficient_material() ? State::InsufficientMaterial : State::Ongoing;
}

// No mate is possible: a single knight or bishop beside the kings, or bishops that are all on squares of one colour.
bool Board::insufficient_material() const {
  if (pieces_[Pawn] | pieces_[Rook] | pieces_[Queen]) return false;
  if (count(pieces_[Knight] | pieces_[Bishop]) <= 1) return true;
  return !pieces_[Knight] && (!(pieces_[Bishop] & DARK_SQUARES) || !(pieces_[Bishop] & ~DARK_SQUARES));
}

Square Board::king(Color color) const { return lowest(pieces(color, King)); }

// Where the piece of the side to move can go, but for the safety of its own king.
Bitboard Board::targets(Square from) const {
  const Bitboard occupied = colors_[White] | colors_[Black];
  const Piece piece = piece_at(from);
  if (piece != Pawn) {
    const Bitboard result = attacks(piece, from, occupied) & ~colors_[turn_];
    return piece == King ? result | castling_targets() : result;
  }
  Bitboard result = LEAPS.pawn[turn_][from] & (colors_[opponent()] | en_passant_);
  const int forward = turn_ == White ? 8 : -8;
  if (!(occupied & bit(from + forward))) {
    result |= bit(from + forward);
    const bool first = rank_of(from) == (turn_ == White ? 1 : 6);
    if (first && !(occupied & bit(from + 2 * forward))) result |= bit(from + 2 * forward);
  }
  return result;
}

Bitboard Board::castling_targets() const {
  const Bitboard corners = castling_ & rank_mask(first_rank(turn_));
  if (!corners || in_check()) return 0;
  const Bitboard occupied = colors_[White] | colors_[Black];
  const Square king_square = king(turn_);
  Bitboard result = 0;
  for_each(corners, [&](Square corner) {
    const int side = corner > king_square ? 1 : -1;
    for (Square square = king_square + side; square != corner; square += side) {
      if (occupied & bit(square)) return;
    }
    if (!is_attacked(king_square + side, opponent())) result |= bit(king_square + 2 * side);
  });
  return result;
}

bool Board::is_attacked(Square square, Color by) const {
  const Bitboard occupied = colors_[White] | colors_[Black];
  const Bitboard queens = pieces_[Queen];
  const Bitboard attackers = (LEAPS.pawn[by ^ 1][square] & pieces_[Pawn]) | (LEAPS.knight[square] & pieces_[Knight]) |
                             (LEAPS.king[square] & pieces_[King]) |
                             (slide(square, occupied, BISHOP_STEPS) & (pieces_[Bishop] | queens)) |
                             (slide(square, occupied, ROOK_STEPS) & (pieces_[Rook] | queens));
  return attackers & colors_[by];
}

bool Board::leaves_king_safe(Move move) const {
  Board after = *this;
  after.make(move);
  return !after.is_attacked(after.king(turn_), after.turn_);
}

int64_t perft(const Board& board, int depth) {
  if (depth <= 0) return 1;
  const std::vector<Move> moves = board.legal_moves();
  if (depth == 1) return int64_t(moves.size());
  int64_t leaves = 0;
  for (const Move move : moves) {
    Board after = board;
    after.make(move);
    leaves += perft(after, depth - 1);
  }
  return leaves;
}

}  // namespace llmc::chess
