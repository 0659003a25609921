#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mdk {
namespace {

struct Level {
  const MdkKernels* table;
  bool (*supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports also checks that the operating system saves the wide registers. In
// clang 14 it knows no "f16c".
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Level levels[] = {
    {&mdk_kernels_generic, always},
#if defined(__x86_64__)
    {&mdk_kernels_avx2, has_avx2},
    {&mdk_kernels_avx512, has_avx512},
    {&mdk_kernels_avx512_bf16, has_avx512_bf16},
#elif defined(__aarch64__)
    {&mdk_kernels_neon, always},
#endif
};

std::atomic<const MdkKernels*> active{nullptr};

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const auto& level : levels) names.push_back(level.table->name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto& level : levels)
    if (level.supported()) names.push_back(level.table->name);
  return names;
}

void set_isa(const std::string& name) {
  const bool best = name.empty() || name == "auto";
  const MdkKernels* chosen = nullptr;
  bool known = best;
  for (const auto& level : levels) {
    known = known || name == level.table->name;
    if ((best || name == level.table->name) && level.supported()) chosen = level.table;
  }
  if (!known)
    throw std::invalid_argument("MDK_CPU_ISA: unknown instruction set '" + name +
                                "'; expected auto or one of " + join(compiled_isas()));
  if (chosen == nullptr)
    throw std::invalid_argument("MDK_CPU_ISA: this processor cannot run '" + name +
                                "'; it supports " + join(supported_isas()));
  active.store(chosen);
}

const MdkKernels& kernels() {
  const MdkKernels* table = active.load();
  if (table == nullptr) {
    const char* forced = std::getenv("MDK_CPU_ISA");
    set_isa(forced ? forced : "auto");
    table = active.load();
  }
  return *table;
}

}  // namespace mdk
