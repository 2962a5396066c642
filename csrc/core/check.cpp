#include "core/check.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

namespace llmc {

void throw_error(const char* file, int line, const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  const char* name = std::strrchr(file, '/');
  throw Error(std::string(message) + " (" + (name ? name + 1 : file) + ":" + std::to_string(line) + ")");
}

}  // namespace llmc
