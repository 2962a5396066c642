// llmc._C.chess: games to tokens and back, and the rules of chess. Positions are FEN strings, moves UCI strings.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cinttypes>

#include "bindings/bindings.h"
#include "chess/games.h"
#include "chess/notation.h"
#include "chess/tokens.h"
#include "core/check.h"

namespace llmc::bindings {
namespace {

using chess::Board;
using chess::Games;
using chess::Move;
using chess::Reading;

// (uint16 tokens, {fate: games})
py::tuple to_python(const Games& games) {
  py::dict counts;
  for (size_t fate = 0; fate < chess::FATES.size(); fate++) {
    if (games.counts[fate]) counts[chess::FATES[fate]] = games.counts[fate];
  }
  return py::make_tuple(py::array_t<uint16_t>(py::ssize_t(games.tokens.size()), games.tokens.data()), counts);
}

py::tuple encode_pgn(const py::bytes& text, bool rated, int min_elo, int max_elo, std::string time_control,
                     int min_plies, bool promotions) {
  const chess::Filter filter{rated, min_elo, max_elo, std::move(time_control), min_plies, promotions};
  const std::string_view view(text);
  return to_python([&] {
    const py::gil_scoped_release release;
    return chess::encode_pgn(view, filter);
  }());
}

py::tuple encode_uci(const py::bytes& text, int min_plies, bool promotions) {
  chess::Filter filter;
  filter.min_plies = min_plies;
  filter.promotions = promotions;
  const std::string_view view(text);
  return to_python([&] {
    const py::gil_scoped_release release;
    return chess::encode_uci(view, filter);
  }());
}

std::vector<std::string> uci_of(const std::vector<Move>& moves) {
  std::vector<std::string> result;
  for (const Move move : moves) result.push_back(chess::to_uci(move));
  return result;
}

template <typename Read>
Move read_move(Read read, const std::string& text, const Board& board) {
  Move move;
  const Reading reading = read(text, board, &move);
  LLMC_CHECK(reading != Reading::Unreadable, "'%s' is not the text of a move", text.c_str());
  LLMC_CHECK(reading != Reading::Illegal, "the move %s is illegal in %s", text.c_str(), board.fen().c_str());
  LLMC_CHECK(reading != Reading::Ambiguous, "the move %s is ambiguous in %s", text.c_str(), board.fen().c_str());
  return move;
}

const char* state_of(const std::string& fen) {
  switch (Board(fen).state()) {
    case chess::State::Checkmate:
      return "checkmate";
    case chess::State::Stalemate:
      return "stalemate";
    case chess::State::InsufficientMaterial:
      return "insufficient material";
    default:
      return "ongoing";
  }
}

}  // namespace

void register_chess(py::module_& module) {
  using namespace py::literals;
  py::module_ m = module.def_submodule("chess", "Games of chess to tokens and back. Positions are FEN, moves UCI.");
  m.def("encode_pgn", &encode_pgn, "text"_a, py::kw_only(), "rated"_a = false, "min_elo"_a = 0, "max_elo"_a = 0,
        "time_control"_a = "", "min_plies"_a = 1, "promotions"_a = false,
        "(uint16 tokens, number of games by fate) of PGN text; csrc/chess/games.h explains the filter.");
  m.def("encode_uci", &encode_uci, "text"_a, py::kw_only(), "min_plies"_a = 1, "promotions"_a = false,
        "The same of lines of UCI moves, a game each.");
  m.def(
      "replay",
      [](const std::vector<int64_t>& tokens) {
        const chess::Replay replay = chess::replay(tokens);
        return py::make_tuple(uci_of(replay.moves), replay.used, replay.board.fen());
      },
      "tokens"_a, "(legal moves, tokens they took, position after them) of a game up to what is no legal move.");
  m.def("legal_moves", [](const std::string& fen) { return uci_of(Board(fen).legal_moves()); }, "fen"_a);
  m.def(
      "make_move",
      [](const std::string& fen, const std::string& move) {
        Board board(fen);
        board.make(read_move(chess::read_uci, move, board));
        return board.fen();
      },
      "fen"_a, "move"_a, "The position after a move.");
  m.def(
      "read_san",
      [](const std::string& fen, const std::string& san) {
        return chess::to_uci(read_move(chess::read_san, san, Board(fen)));
      },
      "fen"_a, "san"_a, "The move that short algebraic notation means.");
  m.def("state", &state_of, "fen"_a,
        "\"checkmate\" or \"stalemate\" of the side to move, \"insufficient material\", or \"ongoing\".");
  m.def(
      "perft", [](const std::string& fen, int depth) { return chess::perft(Board(fen), depth); }, "fen"_a, "depth"_a,
      py::call_guard<py::gil_scoped_release>(), "Number of sequences of `depth` legal moves.");
}

}  // namespace llmc::bindings
