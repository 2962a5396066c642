// Loaded programs and libraries: names of kernels, their __shared__ variables, source lines of instructions.
//
// The symbol table that matters (.symtab, with local symbols) is not loaded with the module; it is read from the file.
#include <cxxabi.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core.h"

namespace cudasim {

struct Module {
  std::string path;
  uintptr_t base;
  std::vector<std::pair<uintptr_t, uintptr_t>> segments;  // begin, end
  std::vector<SharedVariable> shared;
  std::unordered_map<uintptr_t, std::string> functions;  // mangled names by address in the file
};

namespace {

// A file in memory, read-only.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file >= 0 && fstat(file, &status) == 0) {
      bytes_ = size_t(status.st_size);
      data_ = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    if (file >= 0) close(file);
  }
  ~MappedFile() {
    if (valid()) munmap(data_, bytes_);
  }
  bool valid() const { return data_ != MAP_FAILED; }
  template <typename T>
  const T* at(size_t offset) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(data_) + offset);
  }

 private:
  void* data_ = MAP_FAILED;
  size_t bytes_ = 0;
};

std::string demangle(const char* mangled) {
  int status;
  char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string result = text ? text : mangled;
  std::free(text);
  return result;
}

// "void ns::(anonymous namespace)::kernel<float>(float*, int)" becomes "ns::kernel<float>".
std::string short_name(const char* mangled) {
  std::string name = demangle(mangled);
  if (name.back() == ')') {
    int depth = 0;
    for (size_t i = name.size(); i-- > 0;) {
      depth += name[i] == ')' ? 1 : name[i] == '(' ? -1 : 0;
      if (depth == 0) {
        name.resize(i);
        break;
      }
    }
  }
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t at; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
  return name;
}

void read_symbols(Module& module) {
  const MappedFile file(module.path);
  if (!file.valid()) return;
  const auto* header = file.at<ElfW(Ehdr)>(0);
  const auto* sections = file.at<ElfW(Shdr)>(header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = file.at<ElfW(Sym)>(sections[i].sh_offset);
    const auto* names = file.at<char>(sections[sections[i].sh_link].sh_offset);
    for (size_t k = 0; k < sections[i].sh_size / sizeof(ElfW(Sym)); k++) {
      const char* name = names + symbols[k].st_name;
      const int type = ELF64_ST_TYPE(symbols[k].st_info);
      if (type == STT_FUNC && symbols[k].st_value) {
        module.functions[symbols[k].st_value] = name;
      } else if (type == STT_TLS && std::strncmp(name, "_ZGV", 4) && std::strstr(name, "B7cudasim")) {
        module.shared.push_back({name, symbols[k].st_value, symbols[k].st_size});  // not guards: the tag of __shared__
      }
    }
  }
}

Module* find_module(const void* address) {
  static std::map<uintptr_t, std::unique_ptr<Module>> modules;  // by base
  Module found;
  auto visit = [&](dl_phdr_info* info) {
    Module candidate;
    bool contains = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
      if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
      const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
      candidate.segments.push_back({begin, begin + info->dlpi_phdr[i].p_memsz});
      contains |= in_range(address, begin, info->dlpi_phdr[i].p_memsz);
    }
    if (!contains) return false;
    candidate.base = info->dlpi_addr;
    candidate.path = *info->dlpi_name ? info->dlpi_name : "/proc/self/exe";
    found = std::move(candidate);
    return true;
  };
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) { return int((*static_cast<decltype(visit)*>(data))(info)); }, &visit);
  if (found.segments.empty()) return nullptr;
  std::unique_ptr<Module>& module = modules[found.base];
  if (!module || module->path != found.path) {
    module = std::make_unique<Module>(std::move(found));
    read_symbols(*module);
  }
  return module.get();
}

// The calling thread's thread-local block that contains address.
std::pair<uintptr_t, size_t> find_thread_locals(const void* address) {
  std::pair<uintptr_t, size_t> block{0, 0};
  auto visit = [&](dl_phdr_info* info) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
      const auto& segment = info->dlpi_phdr[i];
      if (segment.p_type != PT_TLS || !info->dlpi_tls_data) continue;
      const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      if (in_range(address, begin, segment.p_memsz)) block = {begin, segment.p_memsz};
    }
    return block.second != 0;
  };
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) { return int((*static_cast<decltype(visit)*>(data))(info)); }, &visit);
  return block;
}

}  // namespace

const KernelInfo& kernel_info(const Launch& launch) {
  static std::unordered_map<const void*, KernelInfo> kernels;
  auto [it, added] = kernels.try_emplace(launch.kernel);
  if (added) {
    const Module* module = find_module(launch.kernel);
    it->second.module = module;
    const auto function = module->functions.find(reinterpret_cast<uintptr_t>(launch.kernel) - module->base);
    it->second.name = function == module->functions.end() ? "(unknown kernel: the module was stripped)"
                                                          : short_name(function->second.c_str());
  }
  return it->second;
}

StaticShared static_shared(const Launch& launch) {
  const Module* module = kernel_info(launch).module;
  if (module->shared.empty()) return {};
  // Where a module's anchor lies in its block does not change; asking the dynamic linker takes long.
  static std::unordered_map<const void* (*)(), std::pair<size_t, size_t>> anchors;  // offset in the block, bytes of it
  const auto address = reinterpret_cast<uintptr_t>(launch.thread_locals());
  auto [it, added] = anchors.try_emplace(launch.thread_locals);
  if (added) {
    const auto [begin, bytes] = find_thread_locals(reinterpret_cast<const void*>(address));
    it->second = {address - begin, bytes};
  }
  return {reinterpret_cast<char*>(address - it->second.first), it->second.second, &module->shared};
}

bool in_module(const Module* module, const volatile void* p) {
  for (const auto& [begin, end] : module->segments)
    if (in_range(p, begin, end - begin)) return true;
  return false;
}

// Of binutils, which come with the compiler. pc is a return address: the call is before it.
std::string source_line(const void* pc) {
  const Module* module = find_module(pc);
  if (!module) return "?";
  char command[1024];
  std::snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%zx 2>/dev/null", module->path.c_str(),
                size_t(reinterpret_cast<uintptr_t>(pc) - 1 - module->base));
  FILE* output = popen(command, "r");
  if (!output) return "?";
  std::string places;
  char line[512];
  while (std::fgets(line, sizeof line, output)) {
    std::string place(line, std::strcspn(line, " \n"));  // drops "(discriminator 2)"
    if (place.rfind("device.h:", 0) == 0 || place.rfind("ptx.h:", 0) == 0 || place.rfind("tuple:", 0) == 0) continue;
    places += (places.empty() ? "" : " < ") + place;
  }
  pclose(output);
  return places.empty() ? "?" : places;
}

}  // namespace cudasim
