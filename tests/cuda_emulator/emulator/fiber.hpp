// One fiber per CUDA thread: a stack of its own and a switch. A few instructions where we know the processor (a switch
// of ucontext costs two system calls), ucontext elsewhere.
#pragma once
#include <cstddef>
#include <cstdint>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define EMULATOR_RAW __attribute__((no_sanitize("thread", "address", "undefined"), noinline))

namespace cuda_emulator {
#if defined(__x86_64__)
using Context = void*;  // the stack pointer of a fiber that does not run

// Pushes what a callee must preserve, leaves the stack pointer in *from, and continues on `to`.
__attribute__((naked, noinline, no_sanitize("thread", "address", "undefined"))) inline void switch_stack(
    void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
EMULATOR_RAW inline void make_context(Context& c, void* stack, size_t bytes, void (*entry)()) {
  // On entry to a function the stack pointer is 8 past a multiple of 16; above it a null return address.
  auto top = reinterpret_cast<uintptr_t>(stack) + bytes;
  auto* sp = reinterpret_cast<void**>(top & ~uintptr_t(15));
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  c = sp;
}
EMULATOR_RAW inline void switch_context(Context& from, Context& to) { switch_stack(&from, to); }
#else
using Context = ucontext_t;
EMULATOR_RAW inline void make_context(Context& c, void* stack, size_t bytes, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = stack;
  c.uc_stack.ss_size = bytes;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}
EMULATOR_RAW inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif
}  // namespace cuda_emulator
