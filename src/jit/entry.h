// A kernel in a cache or pack directory: the key that names it, and the file that holds it.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "jit/jit.h"
#include "jit/sources.h"

namespace phalanx::jit {

/// What an entry is found by. The compiler's version stands apart, so that a machine without one can take any entry
/// made of the same code.
struct EntryKey {
  std::string name;     ///< the kernel's
  std::string content;  ///< content_hash of what goes into the compiler
  std::string nvrtc;    ///< "13.0"; empty in a search that accepts every version
};

/// 32 hexadecimal digits (xxHash-128) of the kernel's text, every device file, the flags (with the architecture) and
/// the version of the entries' format.
std::string content_hash(std::string_view text, std::span<const EmbeddedFile> files, std::span<const std::string> flags,
                         int format);

/// The key of `source` as this library would compile it.
EntryKey entry_key(const KernelSource& source, const std::string& arch, std::string nvrtc);

/// "<name>-<content>-nvrtc<version>.cubin"
std::string file_name(const EntryKey& key);

/// The key that is written in a file's name, also of a temporary or lock file beside an entry; nothing for other files.
std::optional<EntryKey> parse_file_name(const std::string& name);

/// An entry file: a line with a magic word and the xxHash-128 of all that follows, a line of JSON, the cubin.
std::string encode(const EntryKey& key, const Cubin& cubin);

/// Nothing for bytes that are truncated, corrupt, of another format or of another key.
std::optional<Cubin> decode(std::string_view bytes, const EntryKey& key);

/// The entry of `key` in `directory`, if there is a sound one. Never throws for what it finds there.
std::optional<Cubin> read_entry(const std::filesystem::path& directory, const EntryKey& key);

/// Writes beside the final place and renames. @throws std::system_error
void write_entry(const std::filesystem::path& directory, const EntryKey& key, const Cubin& cubin);

}  // namespace phalanx::jit
