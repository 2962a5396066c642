// An NVTX injection library, as a profiler has one: NVTX loads it from NVTX_INJECTION64_PATH. It writes every range that is
// pushed or popped into the file NVTX_RECORD, a line each: "push NAME" or "pop".
#include <nvtx3/nvToolsExt.h>

#include <cstdio>
#include <cstdlib>

namespace {

std::FILE* record = nullptr;
int depth = 0;

int push(const char* name) {
  std::fprintf(record, "push %s\n", name);
  return depth++;
}

int pop() {
  std::fputs("pop\n", record);
  return --depth;
}

template <typename Function>
NvtxFunctionPointer untyped(Function* function) {
  return reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
  const char* path = std::getenv("NVTX_RECORD");
  record = path ? std::fopen(path, "w") : nullptr;
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (!record || !callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &table, &size)) return 0;
  if (size <= NVTX_CBID_CORE_RangePop) return 0;
  *table[NVTX_CBID_CORE_RangePushA] = untyped(push);
  *table[NVTX_CBID_CORE_RangePop] = untyped(pop);
  return 1;
}
