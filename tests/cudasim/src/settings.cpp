// Settings from the environment and from control.h.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core.h"
#include "cudasim/control.h"

namespace cudasim {
namespace {

uint64_t random_state = 1;

bool parse_schedule(const char* text, Settings& settings) {
  if (!std::strcmp(text, "forward")) {
    settings.order = Order::Forward;
  } else if (!std::strcmp(text, "reverse")) {
    settings.order = Order::Reverse;
  } else if (!std::strncmp(text, "random:", 7) && text[7]) {
    char* end;
    const uint64_t seed = std::strtoull(text + 7, &end, 10);
    if (*end) return false;
    settings.order = Order::Random;
    random_state = seed * 2 + 1;
  } else {
    return false;
  }
  return true;
}

Settings from_environment() {
  Settings settings;
  if (const char* text = std::getenv("CUDASIM_SCHEDULE")) {
    if (!parse_schedule(text, settings)) {
      std::fprintf(stderr, "cudasim: CUDASIM_SCHEDULE=%s is not forward, reverse or random:SEED\n", text);
      std::exit(2);
    }
  }
  if (const char* text = std::getenv("CUDASIM_LAZY")) settings.lazy = std::atoi(text) != 0;
  if (const char* text = std::getenv("CUDASIM_SHARED_MEMORY")) settings.shared_memory = std::atoi(text);
  if (const char* text = std::getenv("CUDASIM_MEMORY")) settings.memory = std::strtoull(text, nullptr, 10);
  if (const char* text = std::getenv("CUDASIM_DEVICES")) settings.devices = std::atoi(text);
  return settings;
}

}  // namespace

Settings& settings() {
  static Settings settings = from_environment();
  return settings;
}

// xorshift64*: fast, and the same on every machine.
unsigned random_below(unsigned n) {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return unsigned((random_state * 0x2545f4914f6cdd1dull) >> 32) % n;
}

}  // namespace cudasim

using namespace cudasim;

int cudasim_set_schedule(const char* schedule) { return parse_schedule(schedule, settings()); }

void cudasim_set_lazy(int lazy) {
  const ApiCall call;
  if (!lazy) synchronize_all();
  settings().lazy = lazy != 0;
}

void cudasim_set_shared_memory(int bytes) { settings().shared_memory = bytes; }
