// Errors are exceptions that carry one clear sentence plus the source file and line that found the fault.
#pragma once

#include <stdexcept>

namespace llmc {

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Error with the printf-formatted message followed by " (file.cpp:line)".
[[noreturn]] void throw_error(const char* file, int line, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

}  // namespace llmc

// LLMC_CHECK(condition, "what is wrong, with the values, and the fix", ...): throws llmc::Error unless the condition holds.
#define LLMC_CHECK(condition, ...)                                          \
  do {                                                                      \
    if (!(condition)) ::llmc::throw_error(__FILE__, __LINE__, __VA_ARGS__); \
  } while (0)
