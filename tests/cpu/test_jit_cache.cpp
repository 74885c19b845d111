// The caches under fire. What counts is a fresh process, so this program is also its own child: `--child get LINE...`.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <latch>
#include <random>
#include <sstream>
#include <thread>

#include "jit/entry.h"
#include "jit/file_lock.h"
#include "jit/jit.h"
#include "phalanx/status.h"

namespace phalanx::jit {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;

// --- the child -------------------------------------------------------------------------------------------------------

// Another salt, another kernel. "slow" compiles for long enough that processes started together do meet.
KernelSource kernel_of(const std::string& salt) {
  if (salt == "broken") return {"broken", "extern \"C\" __global__ void phalanx_kernel() { undeclared(); }"};
  const int size = salt.starts_with("slow") ? 200 : 1;
  return {"test_" + salt, fmt::format(R"(#include "device/types.h"
// {}
extern "C" __global__ void __launch_bounds__(256, 1) phalanx_kernel(float* x) {{
  float v[{}];
#pragma unroll
  for (int i = 0; i < {}; ++i) v[i] = x[i * threadIdx.x];
#pragma unroll
  for (int round = 0; round < 3; ++round)
#pragma unroll
    for (int i = 0; i < {}; ++i) v[i] = v[i] * v[(i * 7 + 1) % {}] + round;
#pragma unroll
  for (int i = 0; i < {}; ++i) x[i * threadIdx.x] = v[i];
}}
)",
                                      salt, size, size, size, size, size)};
}

std::string get(const std::string& salt) {
  constexpr const char* kOrigins[] = {"memory", "pack", "disk", "compiled"};
  try {
    const auto cubin = get_cubin(kernel_of(salt), "sm_90a");
    return cubin->bytes.starts_with(
               "\x7f"
               "ELF")
               ? kOrigins[static_cast<int>(cubin->origin)]
               : "not-an-elf";
  } catch (const Error& error) {
    return fmt::format("error-{} {}", static_cast<int>(error.code()), error.what());
  }
}

// "get SALT...": one after the other. "threads N SALT": N threads at once. "publish DIR SALT". "nvrtc": its path.
int child(const std::vector<std::string>& arguments) {
  if (arguments.at(0) == "get") {
    for (std::size_t i = 1; i < arguments.size(); ++i) std::cout << get(arguments[i]) << "\n";
  } else if (arguments.at(0) == "threads") {
    std::vector<std::string> results(std::stoul(arguments.at(1)));
    std::latch start(static_cast<std::ptrdiff_t>(results.size()));
    {
      std::vector<std::jthread> threads;
      for (std::string& result : results) {
        threads.emplace_back([&] {
          start.arrive_and_wait();
          result = get(arguments.at(2));
        });
      }
    }
    for (const std::string& result : results) std::cout << result << "\n";
  } else if (arguments.at(0) == "nvrtc") {
    std::cout << nvrtc_info().path << "\n";
  } else if (arguments.at(0) == "publish") {
    publish(arguments.at(1), kernel_of(arguments.at(2)), "sm_90a", compile(kernel_of(arguments.at(2)), "sm_90a"));
  }
  return 0;
}

// --- its parent ------------------------------------------------------------------------------------------------------

struct Output {
  std::vector<std::string> lines;  // of stdout
  std::string log;                 // stderr
  int status = -1;

  int warnings() const {
    int count = 0;
    for (std::size_t at = log.find("warning"); at != std::string::npos; at = log.find("warning", at + 1)) ++count;
    return count;
  }
};

std::string read_all(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_all(const fs::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

// A child that runs while this object waits; `prologue` is shell, run in front of it.
class Child {
 public:
  Child(const fs::path& log, const std::string& environment, const std::string& arguments,
        const std::string& prologue = "")
      : log_(log) {
    const std::string self = fs::read_symlink("/proc/self/exe").string();
    const std::string command = fmt::format(
        "{} exec env -u PHALANX_LOG_LEVEL -u PHALANX_PACK_PATH -u PHALANX_CACHE_DIR {} '{}' "
        "--child {} 2>'{}'",
        prologue, environment, self, arguments, log_.string());
    pipe_ = popen(command.c_str(), "r");
  }

  Output wait() {
    Output output;
    std::string text;
    for (int c = std::fgetc(pipe_); c != EOF; c = std::fgetc(pipe_)) text.push_back(static_cast<char>(c));
    output.status = pclose(pipe_);
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) output.lines.push_back(line);
    output.log = read_all(log_);
    return output;
  }

 private:
  fs::path log_;
  FILE* pipe_ = nullptr;
};

class JitCache : public testing::Test {
 protected:
  JitCache() : root_(fs::temp_directory_path() / fmt::format("phalanx-test-{:08x}", std::random_device{}())) {
    fs::create_directories(root_);
  }
  ~JitCache() override { fs::remove_all(root_); }

  Output run(const std::string& environment, const std::string& arguments, const std::string& prologue = "") {
    Output output = Child(root_ / "log", environment, arguments, prologue).wait();
    EXPECT_EQ(output.status, 0) << output.log;
    return output;
  }
  Output run_here(const std::string& arguments) { return run(here(), arguments); }

  std::string here() const { return "PHALANX_CACHE_DIR=" + cache().string(); }
  fs::path cache() const { return root_ / "cache"; }

  // Every file, hidden ones too.
  static std::vector<fs::path> files_in(const fs::path& directory) {
    std::vector<fs::path> files;
    if (fs::exists(directory)) {
      for (const auto& file : fs::directory_iterator(directory)) files.push_back(file.path());
    }
    return files;
  }

  fs::path only_entry() const {
    const auto files = files_in(cache());
    EXPECT_EQ(files.size(), 1u);
    return files.empty() ? fs::path() : files[0];
  }

  const fs::path root_;
};

using Lines = std::vector<std::string>;
const std::string kNoNvrtc = " PHALANX_NVRTC=/nonexistent/libnvrtc.so.13";

// --- where a kernel comes from ---------------------------------------------------------------------------------------

TEST_F(JitCache, CompilesOnceThenReadsMemoryAndDisk) {
  const Output first = run_here("get a a b");
  EXPECT_EQ(first.lines, (Lines{"compiled", "memory", "compiled"}));
  EXPECT_EQ(first.log, "");
  EXPECT_EQ(run_here("get b a a").lines, (Lines{"disk", "disk", "memory"}));
  EXPECT_EQ(files_in(cache()).size(), 2u) << "one file per kernel, no lock or temporary left";
}

TEST_F(JitCache, ReadsPacksFirstAndLeavesThemAlone) {
  const fs::path pack = root_ / "pack";
  run_here("publish " + pack.string() + " a");
  const auto before = files_in(pack);
  ASSERT_EQ(before.size(), 1u);

  const std::string with_pack = here() + " PHALANX_PACK_PATH=/nonexistent::" + pack.string();
  EXPECT_EQ(run(with_pack, "get a a b").lines, (Lines{"pack", "memory", "compiled"}));
  EXPECT_EQ(files_in(pack), before);
  EXPECT_EQ(files_in(cache()).size(), 1u) << "only b";

  const std::string sound = read_all(before[0]);
  write_all(before[0], "garbage");
  EXPECT_EQ(run(with_pack, "get a").lines, Lines{"compiled"});
  EXPECT_EQ(read_all(before[0]), "garbage") << "a pack is read-only";
  EXPECT_EQ(run(with_pack, "get a").lines, Lines{"disk"});
}

TEST_F(JitCache, ServesWithoutNvrtcWhatIsThere) {
  const fs::path pack = root_ / "pack";
  run_here("publish " + pack.string() + " a");
  EXPECT_EQ(run_here("get b").lines, Lines{"compiled"});
  const Output output = run(here() + kNoNvrtc + " PHALANX_PACK_PATH=" + pack.string(), "get a b b");
  EXPECT_EQ(output.lines, (Lines{"pack", "disk", "memory"}));
}

// --- bad entries -----------------------------------------------------------------------------------------------------

TEST_F(JitCache, ReplacesBadEntries) {
  run_here("get a");
  const fs::path entry = only_entry();
  const std::string sound = read_all(entry);
  ASSERT_GT(sound.size(), 1000u);
  std::string flipped = sound;
  flipped[flipped.size() / 2] ^= 1;

  const fs::path other_cache = root_ / "other";
  run("PHALANX_CACHE_DIR=" + other_cache.string(), "get b");
  const std::string of_another_kernel = read_all(files_in(other_cache).at(0));

  for (const std::string& bad : {std::string(), std::string("hello"), sound.substr(0, sound.size() - 1),
                                 sound.substr(0, 40), flipped, sound + "x", of_another_kernel}) {
    SCOPED_TRACE(bad.size());
    write_all(entry, bad);
    const Output output = run_here("get a");
    EXPECT_EQ(output.lines, Lines{"compiled"});
    EXPECT_EQ(output.log, "");
    EXPECT_EQ(run_here("get a").lines, Lines{"disk"});
  }
}

TEST_F(JitCache, SurvivesThingsThatAreNoFiles) {
  run_here("get a");
  const fs::path entry = only_entry();
  fs::remove(entry);
  ASSERT_EQ(mkfifo(entry.c_str(), 0600), 0);  // whoever opens it to read would wait
  EXPECT_EQ(run_here("get a").lines, Lines{"compiled"});
  EXPECT_EQ(run_here("get a").lines, Lines{"disk"});

  fs::remove(entry);
  fs::create_symlink("/proc/self/mem", entry);  // a regular file, and reading it is an error
  EXPECT_EQ(run_here("get a").lines, Lines{"compiled"});
  EXPECT_EQ(run_here("get a").lines, Lines{"disk"});

  fs::remove(entry);
  fs::create_directories(entry / "full");  // cannot be replaced either
  const Output output = run_here("get a");
  EXPECT_EQ(output.lines, Lines{"compiled"});
  EXPECT_EQ(output.warnings(), 1) << output.log;
}

// --- bad directories: one warning, never a failure -------------------------------------------------------------------

TEST_F(JitCache, WarnsOnceOfAnUnwritableDirectory) {
  write_all(root_ / "file", "in the way");  // root may write anywhere but below a file
  for (const std::string& directory : {(root_ / "file" / "cache").string(), std::string("/proc/phalanx")}) {
    const Output output = run("PHALANX_CACHE_DIR=" + directory, "get a b a c");
    EXPECT_EQ(output.lines, (Lines{"compiled", "compiled", "memory", "compiled"}));
    EXPECT_EQ(output.warnings(), 1) << output.log;
    EXPECT_NE(output.log.find(directory), std::string::npos) << output.log;
    EXPECT_NE(output.log.find("PHALANX_CACHE_DIR"), std::string::npos) << output.log;
  }
}

TEST_F(JitCache, WarnsOnceWithoutAnyDirectory) {
  const Output output = run("-u HOME -u XDG_CACHE_HOME", "get a b");
  EXPECT_EQ(output.lines, (Lines{"compiled", "compiled"}));
  EXPECT_EQ(output.warnings(), 1) << output.log;
  EXPECT_NE(output.log.find("HOME"), std::string::npos) << output.log;
}

TEST_F(JitCache, WarnsOnceWhenAFileMayNotGrow) {
  fs::create_directories(cache());
  // The log is a file as well: one block is enough for the warning, and too little for an entry.
  const Output output = run(here(), "get a b", "trap '' XFSZ; ulimit -f 1;");
  EXPECT_EQ(output.lines, (Lines{"compiled", "compiled"}));
  EXPECT_EQ(output.warnings(), 1) << output.log;
  EXPECT_TRUE(files_in(cache()).empty());
}

TEST_F(JitCache, WarnsOnceOfAFullDisk) {
  fs::create_directories(cache());
  const std::string mount = fmt::format("mount -t tmpfs -o size=4k none '{}'", cache().string());
  if (std::system(("unshare -m sh -c \"" + mount + "\" 2>/dev/null").c_str()) != 0) {
    GTEST_SKIP() << "mounting a file system that is soon full takes root";
  }
  const Output output = run(here(), "get a b", "unshare -m sh -c \"" + mount + " && \\\"\\$@\\\"\" sh");
  EXPECT_EQ(output.lines, (Lines{"compiled", "compiled"}));
  EXPECT_EQ(output.warnings(), 1) << output.log;
  EXPECT_NE(output.log.find("No space left"), std::string::npos) << output.log;
}

TEST_F(JitCache, ObeysTheLogLevel) {
  EXPECT_EQ(run("-u HOME -u XDG_CACHE_HOME PHALANX_LOG_LEVEL=off", "get a").log, "");
  EXPECT_NE(run(here() + " PHALANX_LOG_LEVEL=info", "get a").log.find("compiled test_a"), std::string::npos);
  EXPECT_EQ(run(here() + " PHALANX_LOG_LEVEL=loud", "get b").warnings(), 1);
}

// --- concurrency -----------------------------------------------------------------------------------------------------

TEST_F(JitCache, ProcessesThatStartTogetherCompileOnce) {
  constexpr int kProcesses = 4;
  std::vector<Child> children;
  for (int i = 0; i < kProcesses; ++i) children.emplace_back(root_ / fmt::format("log{}", i), here(), "get slow");
  Lines origins;
  for (Child& child : children) {
    const Output output = child.wait();
    ASSERT_EQ(output.lines.size(), 1u) << output.log;
    origins.push_back(output.lines[0]);
  }
  std::sort(origins.begin(), origins.end());
  EXPECT_EQ(origins, (Lines{"compiled", "disk", "disk", "disk"}));
  EXPECT_EQ(files_in(cache()).size(), 1u);
}

TEST_F(JitCache, ThreadsThatStartTogetherCompileOnce) {
  for (const std::string& environment : {here(), std::string("-u HOME -u XDG_CACHE_HOME")}) {
    const Lines origins = run(environment, "threads 8 slow").lines;
    ASSERT_EQ(origins.size(), 8u);
    EXPECT_EQ(std::count(origins.begin(), origins.end(), "compiled"), 1);
    EXPECT_EQ(std::count(origins.begin(), origins.end(), "memory"), 7);
  }
}

TEST_F(JitCache, LockGoesOnWithoutAHolderThatHangs) {
  const fs::path path = root_ / "kernel.lock";
  {
    const FileLock holder(path, milliseconds(0));
    ASSERT_TRUE(holder.held());
    EXPECT_FALSE(FileLock(path, milliseconds(20)).held());
    EXPECT_TRUE(fs::exists(path)) << "who gave up must not take the holder's file away";
  }
  EXPECT_FALSE(fs::exists(path));
  EXPECT_TRUE(FileLock(path, milliseconds(0)).held());
  EXPECT_FALSE(FileLock("/nonexistent/kernel.lock", milliseconds(1000)).held());
}

TEST_F(JitCache, LockThatWasWaitedForKeepsOthersOut) {
  const fs::path path = root_ / "kernel.lock";
  auto holder = std::make_unique<FileLock>(path, milliseconds(0));
  std::latch locked(1), looked(1);
  std::jthread waiter([&] {
    const FileLock lock(path, milliseconds(60000));
    locked.count_down();
    looked.wait();
  });
  std::this_thread::sleep_for(milliseconds(100));  // by now the waiter has opened the file that the holder removes
  holder.reset();
  locked.wait();
  EXPECT_FALSE(FileLock(path, milliseconds(20)).held());
  looked.count_down();
}

// --- errors ----------------------------------------------------------------------------------------------------------

TEST_F(JitCache, ReportsAFailingCompileEachTimeAndKeepsNothing) {
  const Output output = run_here("get broken broken a");
  const std::string text = fmt::format("{}", fmt::join(output.lines, "\n"));
  std::size_t failures = 0;
  for (const std::string& line : output.lines) {
    failures += line.starts_with(fmt::format("error-{} ", static_cast<int>(ErrorCode::compilation_failed)));
  }
  EXPECT_EQ(failures, 2u) << text;
  EXPECT_NE(text.find("identifier \"undeclared\" is undefined"), std::string::npos) << text;
  EXPECT_EQ(output.lines.back(), "compiled");
  EXPECT_EQ(files_in(cache()).size(), 1u);
}

TEST_F(JitCache, SaysWhatIsMissingWithoutNvrtc) {
  for (const std::string& library : {std::string("/nonexistent/libnvrtc.so.13"), std::string("libm.so.6")}) {
    const Output output = run(here() + " PHALANX_NVRTC=" + library, "get a");
    ASSERT_FALSE(output.lines.empty());
    const std::string& first = output.lines[0];
    EXPECT_TRUE(first.starts_with(fmt::format("error-{} ", static_cast<int>(ErrorCode::unsupported)))) << first;
    EXPECT_NE(first.find("PHALANX_NVRTC is '" + library + "'"), std::string::npos) << first;
    EXPECT_NE(first.find("expected the full path of libnvrtc.so.13"), std::string::npos) << first;
  }
}

TEST_F(JitCache, FollowsTheHintToNvrtc) {
  // Under another name and away from its builtins, which must be found all the same.
  const std::string hint = (root_ / "libnvrtc.so.hinted").string();
  fs::create_symlink(fs::canonical(nvrtc_info().path), hint);
  const std::string hinted = "-u PHALANX_NVRTC " + here() + " PHALANX_NVRTC_HINT=" + hint;
  EXPECT_EQ(run(hinted, "nvrtc").lines, Lines{hint});
  EXPECT_EQ(run(hinted, "get a").lines, Lines{"compiled"});
  // A hint that leads nowhere is passed over.
  const std::string elsewhere = fs::canonical(nvrtc_info().path).parent_path().string();
  const std::string lost = "-u PHALANX_NVRTC LD_LIBRARY_PATH=" + elsewhere + " " + here();
  EXPECT_EQ(run(lost + " PHALANX_NVRTC_HINT=/nonexistent/libnvrtc.so.13", "get b").lines, Lines{"compiled"});
}

// --- where things are ------------------------------------------------------------------------------------------------

class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    value != nullptr ? setenv(name, value, 1) : unsetenv(name);
  }
  ~Variable() { old_ ? setenv(name_, old_->c_str(), 1) : unsetenv(name_); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
  std::optional<std::string> old_;
};

TEST(Directories, FollowTheEnvironment) {
  const Variable home("HOME", "/home/x");
  {
    const Variable own("PHALANX_CACHE_DIR", "/own"), xdg("XDG_CACHE_HOME", "/xdg");
    EXPECT_EQ(cache_dir(), "/own");
  }
  const Variable own("PHALANX_CACHE_DIR", nullptr);
  {
    const Variable xdg("XDG_CACHE_HOME", "/xdg");
    EXPECT_EQ(cache_dir(), "/xdg/phalanx");
  }
  {
    const Variable xdg("XDG_CACHE_HOME", "relative");
    EXPECT_EQ(cache_dir(), "/home/x/.cache/phalanx");
  }
  const Variable xdg("XDG_CACHE_HOME", nullptr);
  EXPECT_EQ(cache_dir(), "/home/x/.cache/phalanx");
  const Variable nowhere("HOME", nullptr);
  EXPECT_EQ(cache_dir(), "");

  const Variable packs("PHALANX_PACK_PATH", "/a::/b:");
  const auto directories = pack_dirs();
  ASSERT_EQ(directories.size(), 3u);
  EXPECT_EQ(directories[0], "/a");
  EXPECT_EQ(directories[1], "/b");
  EXPECT_EQ(directories[2], fs::read_symlink("/proc/self/exe").parent_path() / "packs");
}

TEST_F(JitCache, SaysWhatItCouldNotClear) {
  const Variable own("PHALANX_CACHE_DIR", cache().c_str());
  run_here("get a");
  const fs::path entry = only_entry();
  fs::remove(entry);
  fs::create_directories(entry / "full");  // root, too, has to leave it
  const Cleared cleared = clear_cache();
  EXPECT_EQ(cleared.num_kernels, 0);
  EXPECT_EQ(cleared.num_left, 1);
  EXPECT_NE(cleared.error.find(entry.string()), std::string::npos) << cleared.error;
}

TEST_F(JitCache, ListsAndClearsItsOwnFilesAlone) {
  const Variable own("PHALANX_CACHE_DIR", cache().c_str());
  EXPECT_TRUE(cache_entries().empty()) << "a missing directory is an empty cache";
  EXPECT_EQ(clear_cache().num_kernels, 0);

  run_here("get a b");
  const auto entries = cache_entries();
  ASSERT_EQ(entries.size(), 2u);
  EXPECT_EQ(entries[0].kernel, "test_a");
  EXPECT_EQ(entries[1].kernel, "test_b");
  EXPECT_EQ(entries[0].bytes, fs::file_size(entries[0].path));

  write_all(entries[0].path.string() + ".lock", "");
  write_all(entries[0].path.string() + ".1-2.tmp", "half");
  write_all(cache() / "notes.txt", "the user's own");
  EXPECT_EQ(cache_entries().size(), 2u);
  const Cleared cleared = clear_cache();
  EXPECT_EQ(cleared.num_kernels, 2);
  EXPECT_EQ(cleared.num_left, 0) << cleared.error;
  EXPECT_EQ(files_in(cache()), std::vector<fs::path>{cache() / "notes.txt"});
}

}  // namespace
}  // namespace phalanx::jit

int main(int argc, char** argv) {
  if (argc > 2 && std::string(argv[1]) == "--child") return phalanx::jit::child({argv + 2, argv + argc});
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
