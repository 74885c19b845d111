#include "jit/entry.h"

#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>
#include <system_error>

#include "jit/compile.h"
#include "jit/log.h"
#include "text/text.h"

namespace phalanx::jit {
namespace {

namespace fs = std::filesystem;

constexpr int kFormat = 1;  // raise it when the entry file's layout or the meaning of its JSON changes
constexpr std::string_view kMagic = "phalanx-cubin ";
constexpr std::size_t kDigits = 32;
constexpr std::uintmax_t kMaxEntryBytes = 64 << 20;  // a foreign file of that size is not worth reading

std::string to_hex(XXH128_hash_t hash) { return format_text("{:016x}{:016x}", hash.high64, hash.low64); }

std::string hash_of(std::string_view bytes) { return to_hex(XXH3_128bits(bytes.data(), bytes.size())); }

class Hasher {
 public:
  Hasher() : state_(XXH3_createState(), XXH3_freeState) { XXH3_128bits_reset(state_.get()); }

  // With its length, so that no two sequences of fields run together to the same bytes.
  Hasher& add(std::string_view field) {
    const std::uint64_t size = field.size();
    XXH3_128bits_update(state_.get(), &size, sizeof(size));
    XXH3_128bits_update(state_.get(), field.data(), field.size());
    return *this;
  }
  std::string digest() const { return to_hex(XXH3_128bits_digest(state_.get())); }

 private:
  std::unique_ptr<XXH3_state_t, XXH_errorcode (*)(XXH3_state_t*)> state_;
};

std::optional<std::string> read_file(const fs::path& path) {
  std::error_code error;
  // Anything but a regular file, a pipe say, could make us wait for ever.
  if (!fs::is_regular_file(path, error) || fs::file_size(path, error) > kMaxEntryBytes || error) return std::nullopt;
  std::ifstream file(path, std::ios::binary);
  try {
    return std::string(std::istreambuf_iterator<char>(file), {});
  } catch (const std::ios_base::failure&) {  // a failing disk, or a file that another host has replaced
    return std::nullopt;
  }
}

std::optional<Cubin> read_one(const fs::path& directory, const EntryKey& key) {
  const fs::path path = directory / file_name(key);
  const auto bytes = read_file(path);
  if (!bytes) return std::nullopt;
  auto cubin = decode(*bytes, key);
  if (!cubin) log_info(format_text("{} is not a sound entry and will be replaced", path.string()));
  return cubin;
}

// Entries of the same code by whichever compiler, the latest first.
std::vector<EntryKey> any_version(const fs::path& directory, const EntryKey& key) {
  std::vector<EntryKey> keys;
  std::error_code error;
  for (fs::directory_iterator file(directory, error), end; !error && file != end; file.increment(error)) {
    const std::string name = file->path().filename().string();
    const auto found = parse_file_name(name);
    if (found && found->name == key.name && found->content == key.content && name == file_name(*found)) {
      keys.push_back(*found);
    }
  }
  std::sort(keys.begin(), keys.end(), [](const EntryKey& x, const EntryKey& y) { return x.nvrtc > y.nvrtc; });
  return keys;
}

[[noreturn]] void fail(const char* what, const fs::path& path) {
  throw std::system_error(errno, std::generic_category(), format_text("{} {}", what, path.string()));
}

// A file that is gone again unless it was renamed to its final place.
class TemporaryFile {
 public:
  explicit TemporaryFile(fs::path path) : path_(std::move(path)) {
    descriptor_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor_ < 0) fail("cannot create", path_);
  }
  ~TemporaryFile() {
    if (descriptor_ >= 0) close(descriptor_);
    if (!path_.empty()) unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  void write(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("cannot write", path_);
      bytes.remove_prefix(static_cast<std::size_t>(written));
    }
  }

  // No fsync: an entry that a crash leaves short fails its checksum and is compiled again.
  void publish(const fs::path& target) {
    const int descriptor = std::exchange(descriptor_, -1);
    if (close(descriptor) != 0) fail("cannot write", path_);  // some file systems report a full disk only here
    if (rename(path_.c_str(), target.c_str()) != 0) fail("cannot create", target);
    path_.clear();
  }

 private:
  fs::path path_;
  int descriptor_ = -1;
};

}  // namespace

std::string content_hash(std::string_view text, std::span<const EmbeddedFile> files, std::span<const std::string> flags,
                         int format) {
  Hasher hasher;
  hasher.add(std::to_string(format)).add(text);
  for (const EmbeddedFile& file : files) hasher.add(file.name).add(file.text);
  for (const std::string& flag : flags) hasher.add(flag);
  return hasher.digest();
}

EntryKey entry_key(const KernelSource& source, const std::string& arch, std::string nvrtc) {
  return {source.name, content_hash(source.text, device_sources(), compile_flags(arch), kFormat), std::move(nvrtc)};
}

std::string file_name(const EntryKey& key) {
  return format_text("{}-{}-nvrtc{}.cubin", key.name, key.content, key.nvrtc);
}

std::optional<EntryKey> parse_file_name(const std::string& name) {
  static const auto& kPattern = *new std::regex(R"((.+)-([0-9a-f]{32})-nvrtc([0-9]+\.[0-9]+)\.cubin(\..*)?)");
  std::smatch match;
  if (!std::regex_match(name, match, kPattern)) return std::nullopt;
  return EntryKey{match[1], match[2], match[3]};
}

std::string encode(const EntryKey& key, const Cubin& cubin) {
  const CompileInfo& info = cubin.info;
  const nlohmann::json header = {{"name", key.name},
                                 {"content", key.content},
                                 {"nvrtc", key.nvrtc},
                                 {"seconds", info.seconds},
                                 {"registers", info.registers},
                                 {"spill_bytes", info.spill_bytes},
                                 {"stack_bytes", info.stack_bytes},
                                 {"static_smem_bytes", info.static_smem_bytes},
                                 {"warnings", info.warnings}};
  const std::string body = header.dump() + '\n' + cubin.bytes;
  return format_text("{}{}\n{}", kMagic, hash_of(body), body);
}

std::optional<Cubin> decode(std::string_view bytes, const EntryKey& key) {
  const std::size_t body_at = kMagic.size() + kDigits + 1;
  if (bytes.size() < body_at || !bytes.starts_with(kMagic) || bytes[body_at - 1] != '\n') return std::nullopt;
  const std::string_view body = bytes.substr(body_at);
  if (bytes.substr(kMagic.size(), kDigits) != hash_of(body)) return std::nullopt;

  const std::size_t line_end = body.find('\n');
  if (line_end == std::string_view::npos) return std::nullopt;
  try {
    const auto header = nlohmann::json::parse(body.substr(0, line_end));
    if (header.at("name") != key.name || header.at("content") != key.content || header.at("nvrtc") != key.nvrtc) {
      return std::nullopt;
    }
    Cubin cubin;
    cubin.bytes = body.substr(line_end + 1);
    cubin.info = {header.at("nvrtc"),       header.at("seconds"),     header.at("registers"),
                  header.at("spill_bytes"), header.at("stack_bytes"), header.at("static_smem_bytes"),
                  header.at("warnings")};
    return cubin;
  } catch (const nlohmann::json::exception&) {
    return std::nullopt;  // a sound checksum over another program's text
  }
}

std::optional<Cubin> read_entry(const fs::path& directory, const EntryKey& key) {
  if (directory.empty()) return std::nullopt;
  if (!key.nvrtc.empty()) return read_one(directory, key);
  for (const EntryKey& candidate : any_version(directory, key)) {
    if (auto cubin = read_one(directory, candidate)) return cubin;
  }
  return std::nullopt;
}

void write_entry(const fs::path& directory, const EntryKey& key, const Cubin& cubin) {
  fs::create_directories(directory);
  const fs::path target = directory / file_name(key);
  // Unique also among the hosts that share a directory.
  TemporaryFile file(format_text("{}.{}-{:08x}.tmp", target.string(), getpid(), std::random_device{}()));
  file.write(encode(key, cubin));
  file.publish(target);
}

}  // namespace phalanx::jit
