# What `cmake --install` lays down: library, headers, the command, and the files by which CMake and pkg-config find them.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/phalanx)

install(TARGETS phalanx EXPORT phalanx_targets COMPONENT phalanx LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/phalanx DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT phalanx)
install(EXPORT phalanx_targets NAMESPACE phalanx:: DESTINATION ${package_dir} COMPONENT phalanx)
if(PHALANX_BUILD_CLI)
  install(TARGETS phalanx_cli COMPONENT phalanx RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

configure_package_config_file(cmake/phalanxConfig.cmake.in phalanxConfig.cmake INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may break its users.
write_basic_package_version_file(phalanxConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/phalanxConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/phalanxConfigVersion.cmake
        DESTINATION ${package_dir} COMPONENT phalanx)

# The prefix is found from where the file lies, so that an installed tree can be moved.
file(RELATIVE_PATH PHALANX_PC_PREFIX /p/${CMAKE_INSTALL_LIBDIR}/pkgconfig /p)
configure_file(cmake/phalanx.pc.in phalanx.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/phalanx.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT phalanx)
