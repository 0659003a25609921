// Which instruction set runs. Best supported by default; MDK_CPU_ISA or set_isa() forces one.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace mdk {

// The active table. Throws std::invalid_argument when MDK_CPU_ISA names an unknown level or one
// that this processor cannot run.
const MdkKernels& kernels();

std::vector<std::string> compiled_isas();   // worst first
std::vector<std::string> supported_isas();  // the compiled ones this processor can run
void set_isa(const std::string& name);      // "" or "auto": back to the default choice

}  // namespace mdk
