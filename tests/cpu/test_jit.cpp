// Compiling: what NVRTC is given, what is read out of its log, how it fails. The caches are test_jit_cache.cpp's.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>

#include "jit/compile.h"
#include "jit/entry.h"
#include "jit/jit.h"
#include "jit/sources.h"
#include "phalanx/status.h"

namespace phalanx::jit {
namespace {

namespace fs = std::filesystem;

std::string read_all(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

const std::string kStore = R"(#include "device/types.h"
extern "C" __global__ void phalanx_kernel(phalanx::u32* out) { out[threadIdx.x] = phalanx::ceil_div(7u, 2u); }
)";

// --- the embedded device files ---------------------------------------------------------------------------------------

TEST(DeviceSources, AreTheFilesOnDiskByteForByte) {
  std::set<std::string> embedded;
  for (const EmbeddedFile& file : device_sources()) {
    EXPECT_TRUE(file.text == read_all(fs::path(PHALANX_SOURCE_DIR) / file.name)) << file.name;
    EXPECT_EQ(file.text.data()[file.text.size()], '\0') << "NVRTC takes C strings";
    embedded.insert(file.name);
  }
  std::set<std::string> on_disk;
  for (const auto& file : fs::recursive_directory_iterator(fs::path(PHALANX_SOURCE_DIR) / "device")) {
    if (file.is_regular_file()) on_disk.insert(fs::relative(file.path(), PHALANX_SOURCE_DIR).string());
  }
  EXPECT_EQ(embedded, on_disk);
}

TEST(DeviceSources, AreSortedByName) {
  const auto files = device_sources();
  EXPECT_TRUE(std::is_sorted(files.begin(), files.end(), [](const auto& x, const auto& y) {
    return std::string_view(x.name) < std::string_view(y.name);
  }));
}

// --- keys ------------------------------------------------------------------------------------------------------------

TEST(Key, ChangesWithEachIngredient) {
  const std::vector<EmbeddedFile> files = {{"device/a.h", "int a;"}, {"device/b.h", "int b;"}};
  const std::vector<EmbeddedFile> other_text = {{"device/a.h", "int a;"}, {"device/b.h", "int b; "}};
  const std::vector<EmbeddedFile> other_name = {{"device/a.h", "int a;"}, {"device/c.h", "int b;"}};
  const std::vector<EmbeddedFile> fewer = {{"device/a.h", "int a;"}};
  const std::vector<std::string> flags = {"-arch=sm_90a", "-std=c++20"};
  const std::vector<std::string> other_flags = {"-arch=sm_90a", "-std=c++17"};
  const std::vector<std::string> joined_flags = {"-arch=sm_90a-std=c++20"};

  const std::set<std::string> hashes = {
      content_hash("text", files, flags, 1),       content_hash("text ", files, flags, 1),
      content_hash("", files, flags, 1),           content_hash("text", other_text, flags, 1),
      content_hash("text", other_name, flags, 1),  content_hash("text", fewer, flags, 1),
      content_hash("text", files, other_flags, 1), content_hash("text", files, joined_flags, 1),
      content_hash("text", files, {}, 1),          content_hash("text", files, flags, 2),
  };
  EXPECT_EQ(hashes.size(), 10u);
  EXPECT_EQ(content_hash("text", files, flags, 1), content_hash("text", files, flags, 1));

  const KernelSource source{"store", kStore};
  const std::set<std::string> names = {
      file_name(entry_key(source, "sm_90a", "13.0")),
      file_name(entry_key(source, "sm_100a", "13.0")),
      file_name(entry_key(source, "sm_90a", "13.1")),
      file_name(entry_key({"other", kStore}, "sm_90a", "13.0")),
      file_name(entry_key({"store", kStore + " "}, "sm_90a", "13.0")),
  };
  EXPECT_EQ(names.size(), 5u);
}

TEST(Key, IsReadBackFromTheFileName) {
  const EntryKey key = entry_key({"gemm_fp8_128x128_c2_s1_st4_w2_bf16", kStore}, "sm_90a", "13.0");
  for (const char* suffix : {"", ".lock", ".17-00ff00ff.tmp"}) {
    const auto parsed = parse_file_name(file_name(key) + suffix);
    ASSERT_TRUE(parsed.has_value()) << suffix;
    EXPECT_EQ(parsed->name, key.name);
    EXPECT_EQ(parsed->content, key.content);
    EXPECT_EQ(parsed->nvrtc, key.nvrtc);
  }
  for (const char* foreign : {"", "notes.txt", "a.cubin", "a-0123-nvrtc13.0.cubin", "a-nvrtc13.0.cubin"}) {
    EXPECT_FALSE(parse_file_name(foreign).has_value()) << foreign;
  }
}

// --- entries ---------------------------------------------------------------------------------------------------------

const EntryKey kKey{"kernel", std::string(32, 'a'), "13.0"};

Cubin some_cubin() {
  Cubin cubin;
  cubin.bytes = std::string(
      "\x7f"
      "ELF\0\n\xff and more",
      16);
  cubin.info = {"13.0", 0.25, 168, 8, 16, 1024, {"a (C7510) \"warning\"", "another"}};
  return cubin;
}

TEST(Entry, ComesBackAsItWas) {
  const Cubin cubin = some_cubin();
  const auto decoded = decode(encode(kKey, cubin), kKey);
  ASSERT_TRUE(decoded.has_value());
  EXPECT_EQ(decoded->bytes, cubin.bytes);
  EXPECT_EQ(decoded->info.nvrtc, "13.0");
  EXPECT_EQ(decoded->info.seconds, 0.25);
  EXPECT_EQ(decoded->info.registers, 168);
  EXPECT_EQ(decoded->info.spill_bytes, 8);
  EXPECT_EQ(decoded->info.stack_bytes, 16);
  EXPECT_EQ(decoded->info.static_smem_bytes, 1024);
  EXPECT_EQ(decoded->info.warnings, cubin.info.warnings);
}

TEST(Entry, IsRefusedWithAnyByteChangedOrMissing) {
  const std::string bytes = encode(kKey, some_cubin());
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    std::string corrupt = bytes;
    corrupt[i] = static_cast<char>(corrupt[i] ^ (1 << (i % 8)));
    EXPECT_FALSE(decode(corrupt, kKey).has_value()) << "byte " << i;
    EXPECT_FALSE(decode(bytes.substr(0, i), kKey).has_value()) << "cut to " << i;
  }
  EXPECT_FALSE(decode(bytes + '\0', kKey).has_value());
}

TEST(Entry, IsRefusedUnderAnotherKey) {
  const std::string bytes = encode(kKey, some_cubin());
  EXPECT_FALSE(decode(bytes, {"other", kKey.content, kKey.nvrtc}).has_value());
  EXPECT_FALSE(decode(bytes, {kKey.name, std::string(32, 'b'), kKey.nvrtc}).has_value());
  EXPECT_FALSE(decode(bytes, {kKey.name, kKey.content, "12.9"}).has_value());
}

// --- compiling -------------------------------------------------------------------------------------------------------

TEST(Log, TellsRegistersSpillsStackSharedMemoryAndWarnings) {
  const CompileInfo info = parse_log(
      "kernel.cu(13): warning #177-D: variable \"x\" was declared but never referenced\n"
      "   int x;\n"
      "\n"
      "Remark: The warnings can be suppressed with \"-diag-suppress <warning-number>\"\n"
      "\n"
      "ptxas info    : (C7519) warpgroup.arrive is injected in around line 58 by compiler\n"
      "ptxas info    : 8 bytes gmem\n"
      "ptxas info    : Compiling entry function 'phalanx_kernel' for 'sm_90a'\n"
      "ptxas info    : Function properties for phalanx_kernel\n"
      "ptxas         .     3672 bytes stack frame, 4912 bytes spill stores, 5504 bytes spill loads\n"
      "ptxas info    : Used 64 registers, used 1 barriers, 3672 bytes cumulative stack size, 512 bytes smem\n");
  EXPECT_EQ(info.registers, 64);
  EXPECT_EQ(info.stack_bytes, 3672);
  EXPECT_EQ(info.spill_bytes, 4912 + 5504);
  EXPECT_EQ(info.static_smem_bytes, 512);
  ASSERT_EQ(info.warnings.size(), 2u);
  EXPECT_NE(info.warnings[0].find("#177-D"), std::string::npos);
  EXPECT_NE(info.warnings[1].find("C7519"), std::string::npos);
}

TEST(Compile, MakesAnElfWithTheFixedEntryPoint) {
  const Cubin cubin = compile({"store", kStore}, "sm_90a");
  EXPECT_EQ(cubin.bytes.substr(0, 4),
            "\x7f"
            "ELF");
  EXPECT_NE(cubin.bytes.find(kEntryPoint), std::string::npos);
  EXPECT_EQ(cubin.origin, Origin::compiled);
  EXPECT_GT(cubin.info.registers, 0);
  EXPECT_GT(cubin.info.seconds, 0);
  EXPECT_EQ(cubin.info.spill_bytes, 0);
  EXPECT_EQ(cubin.info.stack_bytes, 0);
  EXPECT_TRUE(cubin.info.warnings.empty());
}

TEST(Compile, SeesSpillsAndStaticSharedMemory) {
  const Cubin cubin = compile({"spill", R"(
extern "C" __global__ void __launch_bounds__(1024, 1) phalanx_kernel(float* x) {
  __shared__ float shared[256];
  float v[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) v[i] = x[i * threadIdx.x];
  shared[threadIdx.x % 256] = v[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) x[i * threadIdx.x] = v[i] * v[(i * 7 + 1) % 200] + shared[i];
}
)"},
                              "sm_90a");
  EXPECT_GT(cubin.info.spill_bytes, 0);
  EXPECT_GT(cubin.info.stack_bytes, 0);
  EXPECT_EQ(cubin.info.static_smem_bytes, 1024);
}

// Reads an accumulator while the product that writes it is in flight: ptxas has to mend it, and says so.
TEST(Compile, ReportsWhatPtxasSaysOfWgmma) {
  const Cubin cubin = compile({"serialised", R"(
extern "C" __global__ void __launch_bounds__(128, 1) phalanx_kernel(float* out, unsigned long long a, unsigned long long b) {
  float d[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, 1, 1, 1;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    d[0] += 1.0f;
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    out[i] = d[0];
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
)"},
                              "sm_90a");
  ASSERT_FALSE(cubin.info.warnings.empty());
  EXPECT_NE(cubin.info.warnings[0].find("(C75"), std::string::npos) << cubin.info.warnings[0];
}

std::string message_of_failure(const KernelSource& source, const std::string& arch, ErrorCode code) {
  try {
    compile(source, arch);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    return error.what();
  }
  ADD_FAILURE() << source.name << " compiled";
  return "";
}

TEST(Compile, FailsWithTheLog) {
  const auto message = message_of_failure({"broken", "extern \"C\" __global__ void phalanx_kernel() { undeclared(); }"},
                                          "sm_90a", ErrorCode::compilation_failed);
  EXPECT_NE(message.find("kernel broken for sm_90a"), std::string::npos) << message;
  EXPECT_NE(message.find("identifier \"undeclared\" is undefined"), std::string::npos) << message;
}

TEST(Compile, FailsForAnUnknownArchitecture) {
  const auto message = message_of_failure({"store", kStore}, "sm_1", ErrorCode::compilation_failed);
  EXPECT_NE(message.find("sm_1"), std::string::npos) << message;
}

TEST(Compile, SeesNoFileButTheEmbeddedOnes) {
  std::ofstream("phalanx_stray.h") << "#define STRAY 1\n";
  message_of_failure({"stray", "#include \"phalanx_stray.h\"\nextern \"C\" __global__ void phalanx_kernel() {}"},
                     "sm_90a", ErrorCode::compilation_failed);
  fs::remove("phalanx_stray.h");
}

TEST(Nvrtc, SaysWhichLibraryItIs) {
  const NvrtcInfo info = nvrtc_info();
  ASSERT_TRUE(info.available) << info.error;
  EXPECT_GE(info.major, 12);
  EXPECT_TRUE(fs::exists(info.path)) << info.path;
  EXPECT_EQ(info.error, "");
}

}  // namespace
}  // namespace phalanx::jit
