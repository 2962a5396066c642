#include "core/device.h"

#include <algorithm>
#include <cctype>

#include "core/check.h"

namespace llmc {

Device parse_device(const std::string& name) {
  if (name == "cpu") return {};
  if (name == "cuda") return {true, 0};
  const std::string digits = name.rfind("cuda:", 0) == 0 ? name.substr(5) : "";
  const bool valid = !digits.empty() && digits.size() <= 3 &&
                     std::all_of(digits.begin(), digits.end(), [](unsigned char c) { return std::isdigit(c); });
  LLMC_CHECK(valid, "the device is %s, it must be cpu, cuda or cuda:N", name.c_str());
  return {true, std::stoi(digits)};
}

}  // namespace llmc
