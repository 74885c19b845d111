#!/usr/bin/env bash
# Usage: tests/consumer/run.sh BUILD_DIR
# Installs BUILD_DIR to a scratch prefix and moves it away, builds a program against it by CMake and by pkg-config, runs
# both, and looks at what the library exports and needs.
set -euo pipefail

build=$(realpath "$1")
here=$(dirname "$(realpath "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake --install "$build" --prefix "$work/staging" --component phalanx >"$work/log" || { cat "$work/log"; exit 1; }
mv "$work/staging" "$work/prefix"  # an installed tree may be moved
library=$(find "$work/prefix" -name libphalanx.so)
lib_dir=$(dirname "$library")

echo "- CMake's find_package"
build_by_cmake() {
  cmake -S "$here" -B "$work/build" -G Ninja -DCMAKE_PREFIX_PATH="$work/prefix" && cmake --build "$work/build"
}
build_by_cmake >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$work/build/consumer"

echo "- pkg-config"
export PKG_CONFIG_PATH=$lib_dir/pkgconfig
# shellcheck disable=SC2046  # flags are words
"${CXX:-c++}" -std=c++20 "$here/main.cpp" -o "$work/consumer" $(pkg-config --cflags --libs phalanx)
LD_LIBRARY_PATH=$lib_dir "$work/consumer"

echo "- versions"
header=$(sed -n 's/.*PHALANX_VERSION_STRING "\(.*\)"/\1/p' "$work/prefix/include/phalanx/version.h")
[[ $(pkg-config --modversion phalanx) == "$header" ]] || { echo "pkg-config says another version than $header"; exit 1; }
[[ $(LD_LIBRARY_PATH=$lib_dir "$work/prefix/bin/phalanx" --version) == "phalanx $header" ]]

echo "- symbols: only phalanx:: is exported"
foreign=$(nm -D --defined-only --demangle "$library" | cut -d' ' -f3- |
  grep -vE '^(typeinfo (name )?for |vtable for )?phalanx::' || true)
[[ -z $foreign ]] || { echo "exported beside the API: $foreign"; exit 1; }

echo "- dependencies: the C and C++ runtime alone"
needed=$(readelf -d "$library" | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' |
  grep -vE '^(libc|libm|libstdc\+\+|libgcc_s|libdl|libpthread|ld-linux.*)\.so' || true)
[[ -z $needed ]] || { echo "needs beside the runtime: $needed"; exit 1; }
