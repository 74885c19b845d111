# Debian's packages; `./dev` installs them. All of them end up inside the shared library, which depends on libstdc++ alone.
find_package(fmt REQUIRED)
find_package(spdlog REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(Threads REQUIRED)
find_path(XXHASH_INCLUDE_DIR xxhash.h REQUIRED)

# Static, so that its number of threads is ours to set, whatever BLAS the process uses beside us.
find_library(OPENBLAS_LIBRARY NAMES libopenblas.a REQUIRED)
find_path(OPENBLAS_INCLUDE_DIR cblas.h PATH_SUFFIXES openblas-pthread openblas x86_64-linux-gnu/openblas-pthread REQUIRED)

add_library(phalanx_dependencies INTERFACE)
target_compile_definitions(phalanx_dependencies INTERFACE FMT_HEADER_ONLY SPDLOG_HEADER_ONLY SPDLOG_FMT_EXTERNAL XXH_INLINE_ALL)
target_include_directories(phalanx_dependencies SYSTEM INTERFACE ${XXHASH_INCLUDE_DIR} ${OPENBLAS_INCLUDE_DIR})
target_link_libraries(phalanx_dependencies INTERFACE fmt::fmt-header-only spdlog::spdlog_header_only nlohmann_json::nlohmann_json
                                                     ${OPENBLAS_LIBRARY} Threads::Threads ${CMAKE_DL_LIBS})
