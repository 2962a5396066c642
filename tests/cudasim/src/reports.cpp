// Reports: collected while kernels run, printed and kept as text afterwards.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "core.h"
#include "cudasim/control.h"

namespace cudasim {
namespace {

constexpr size_t kMaxReports = 100;  // after that they are counted only

struct Pending {
  std::string text;
  std::vector<Site> sites;
};
std::vector<Pending> pending;
std::string finished_text;
int count;
std::set<std::string> seen;

std::string context() {
  if (!in_kernel()) return "";
  char text[128];
  const uint3 thread = current_thread->index;
  std::snprintf(text, sizeof text, " block (%u,%u,%u) thread (%u,%u,%u): ", blockIdx.x, blockIdx.y, blockIdx.z,
                thread.x, thread.y, thread.z);
  return "kernel " + current_kernel + text;
}

std::string format_text(const char* format, va_list arguments) {
  char text[512];
  std::vsnprintf(text, sizeof text, format, arguments);
  return text;
}

void add(const char* kind, const std::string& key, const std::string& text, std::vector<Site> sites) {
  if (!seen.insert(kind + ("\n" + key)).second) return;
  count++;
  if (size_t(count) > kMaxReports) return;
  pending.push_back({std::string(kind) + ": " + context() + text, std::move(sites)});
  if (!in_kernel()) finish_reports();
}

std::string key_of(const Site& site) {
  char text[64];
  std::snprintf(text, sizeof text, "%p %p %d ", site.pc, static_cast<const void*>(site.file), site.line);
  return text;
}

}  // namespace

std::string describe(const Site& site) {
  if (site.pc) {
    static std::unordered_map<const void*, std::string> lines;
    auto [it, added] = lines.try_emplace(site.pc);
    if (added) it->second = source_line(site.pc);
    return it->second;
  }
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

void report(const char* kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string text = format_text(format, arguments);
  va_end(arguments);
  add(kind, text, text, {});
}

void report_at(const char* kind, const char* file, int line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const Site site{nullptr, file, line};
  add(kind, key_of(site) + current_kernel, format_text(format, arguments), {site});
  va_end(arguments);
}

void report_site(const char* kind, const Site& site, const Site* other, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vector<Site> sites{site};
  if (other) sites.push_back(*other);
  std::string keys[2] = {key_of(site), other ? key_of(*other) : ""};
  if (keys[1] < keys[0]) std::swap(keys[0], keys[1]);  // either of the two may come first
  add(kind, keys[0] + keys[1], format_text(format, arguments), sites);
  va_end(arguments);
}

void finish_reports() {
  for (const Pending& report : pending) {
    std::string line = report.text;
    for (size_t i = 0; i < report.sites.size(); i++)
      line += (i == 0 ? " at " : "; other access at ") + describe(report.sites[i]);
    std::fprintf(stderr, "cudasim: %s\n", line.c_str());
    finished_text += line + "\n";
  }
  pending.clear();
}

}  // namespace cudasim

using namespace cudasim;

int cudasim_error_count() { return count; }

const char* cudasim_report() {
  finish_reports();
  return finished_text.c_str();
}

void cudasim_clear() {
  finish_reports();
  finished_text.clear();
  seen.clear();
  count = 0;
  set_sticky_error(cudaSuccess);
}
