# GoogleTest where the system has no package of it: its sources under /usr/src, else fetched.
if(EXISTS /usr/src/googletest/CMakeLists.txt)
  set(FETCHCONTENT_SOURCE_DIR_GOOGLETEST /usr/src/googletest)
else()
  set(gtest_archive ${PROJECT_BINARY_DIR}/googletest.tar.gz)
  set(gtest_hash 8ad598c73ad796e0d8280b082cebd82a630d73e73cd3c70057938a6501bba5d7)
  if(NOT EXISTS ${gtest_archive})
    file(
      DOWNLOAD https://github.com/google/googletest/archive/refs/tags/v1.14.0.tar.gz
      ${gtest_archive}
      STATUS gtest_status
      TIMEOUT 60)
    list(GET gtest_status 0 gtest_failed)
    if(gtest_failed)
      file(REMOVE ${gtest_archive})
      message(
        FATAL_ERROR
          "The C++ tests need GoogleTest, which is neither installed nor could be fetched: "
          "install it (Debian, Ubuntu: apt install libgtest-dev) and run again.")
    endif()
  endif()
endif()

include(FetchContent)
set(INSTALL_GTEST OFF)
set(BUILD_GMOCK OFF)
# Since URL and hash are given here too, a damaged download is refused.
FetchContent_Declare(
  googletest
  URL ${gtest_archive}
  URL_HASH SHA256=${gtest_hash})
FetchContent_MakeAvailable(googletest)
if(NOT TARGET GTest::gtest_main)
  add_library(GTest::gtest_main ALIAS gtest_main)
endif()
