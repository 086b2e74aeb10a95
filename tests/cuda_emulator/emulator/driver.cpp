// Reads cases from stdin, runs each, writes its buffers (or the reason it failed) to stdout. See ../emulation.py.
#include "driver.hpp"

#include <memory>

namespace cuda_emulator {
namespace {

void read_bytes(void* to, size_t n) {
  if (n && std::fread(to, 1, n, stdin) != n) throw std::runtime_error("the request ends early");
}
void write_bytes(const void* from, size_t n) {
  if (n && std::fwrite(from, 1, n, stdout) != n) throw std::runtime_error("cannot write the response");
}
int64_t read_integer() {
  int64_t x;
  read_bytes(&x, sizeof x);
  return x;
}
std::string read_text() {
  std::string s(read_integer(), '\0');
  read_bytes(s.data(), s.size());
  return s;
}

// A buffer of the exact size, so that AddressSanitizer sees a byte past it; `shift` bytes off alignment. Sparse buffers
// are address space without memory, for indices past 2^31: of them only a window at the end travels.
struct Storage {
  Buffer buffer;
  int64_t window = 0;
  unsigned char* base = nullptr;
  size_t mapped = 0;

  Storage(int64_t bytes, int64_t shift, int64_t window) : window(window < 0 ? bytes : window) {
    if (window < 0) {
      void* p = nullptr;
      if (posix_memalign(&p, 256, bytes + shift ? bytes + shift : 1)) throw std::runtime_error("out of memory");
      base = static_cast<unsigned char*>(p);
    } else {
      mapped = bytes + shift;
      base = static_cast<unsigned char*>(
          mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (base == MAP_FAILED) throw std::runtime_error("out of address space");
    }
    buffer = {bytes, base + shift};
  }
  Storage(Storage&& o) noexcept
      : buffer(o.buffer), window(o.window), base(std::exchange(o.base, nullptr)), mapped(o.mapped) {}
  ~Storage() {
    if (mapped && base) munmap(base, mapped);
    else std::free(base);
  }
  unsigned char* visible() { return buffer.data + buffer.bytes - window; }
};

bool run_one() {
  const std::string name = read_text();
  if (name.empty()) return false;
  Case c;
  c.format = read_text();
  c.integers.resize(read_integer());
  for (int64_t& x : c.integers) x = read_integer();
  Engine::get().options.first_block = read_integer();
  std::vector<Storage> storages;
  for (int64_t n = read_integer(); n > 0; --n) {
    const int64_t bytes = read_integer(), shift = read_integer(), window = read_integer();
    storages.emplace_back(bytes, shift, window);
    read_bytes(storages.back().visible(), storages.back().window);
    c.buffers.push_back(storages.back().buffer);
  }
  std::string error;
  try {
    const auto f = functions().find(name);
    if (f == functions().end()) throw std::runtime_error("no case named " + name);
    f->second(c);
  } catch (const std::exception& e) {
    error = e.what();
  }
  const auto length = static_cast<int64_t>(error.size());
  write_bytes(&length, sizeof length);
  write_bytes(error.data(), error.size());
  for (Storage& s : storages) write_bytes(s.visible(), s.window);
  std::fflush(stdout);
  return true;
}

void read_options(int argc, char** argv) {
  Options& o = Engine::get().options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i], value = word.substr(word.find('=') + 1);
    if (word.starts_with("order=")) {
      o.order = value == "forward" ? Order::Forward : value == "reverse" ? Order::Reverse : Order::Random;
      if (o.order == Order::Random) o.seed = std::stoull(value);
    } else if (word.starts_with("copies=")) {
      o.lazy_copies = value == "lazy";
    } else if (word.starts_with("max_blocks=")) {
      o.max_blocks = std::stoll(value);
    } else if (word.starts_with("workspace=")) {
      o.max_workspace_bytes = std::stoll(value);
    } else {
      throw std::runtime_error("unknown option " + word);
    }
  }
}
}  // namespace
}  // namespace cuda_emulator

int main(int argc, char** argv) {
  try {
    cuda_emulator::read_options(argc, argv);
    while (cuda_emulator::run_one()) {
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 3;
  }
}
