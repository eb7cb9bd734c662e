// Which instruction set runs: the widest that the processor has, unless set_isa says otherwise.
#pragma once

namespace fastrlhf {

int active_isa();                       // index into Op::entry
const char* isa_name(int isa);          // "baseline", "avx2", "avx512"
bool isa_available(int isa);            // compiled in, and the processor has it
bool set_isa(const char* name);         // false, and nothing changed: unknown or not available

}  // namespace fastrlhf
