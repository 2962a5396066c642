// Where memory lives and operations run.
#pragma once

#include <string>

namespace llmc {

struct Device {
  bool cuda = false;  // else the CPU
  int index = 0;      // which of several CUDA devices

  bool operator==(const Device& other) const { return cuda == other.cuda && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
};

// "cpu" or "cuda:0"
inline std::string name_of(const Device& device) {
  return device.cuda ? "cuda:" + std::to_string(device.index) : "cpu";
}

// Reads "cpu", "cuda" (the first device) or "cuda:N". Throws Error for anything else.
Device parse_device(const std::string& name);

}  // namespace llmc
