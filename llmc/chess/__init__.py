"""Games of chess as tokens; the rules themselves are in the compiled core (`llmc._C.chess`)."""
