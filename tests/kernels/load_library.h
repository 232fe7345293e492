// Loads a shared library, on Linux or on Windows.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

class LoadedLibrary {
 public:
  explicit LoadedLibrary(const char* path) {
#if defined(_WIN32)
    handle_ = reinterpret_cast<void*>(LoadLibraryA(path));
    if (!handle_) fail(std::string(path) + ": error " + std::to_string(GetLastError()));
#else
    handle_ = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle_) fail(dlerror());
#endif
  }

  // A function that the library exports; ends the program where it does not.
  template <class Function>
  Function* get(const char* name) const {
#if defined(_WIN32)
    const auto symbol = GetProcAddress(reinterpret_cast<HMODULE>(handle_), name);
#else
    const auto symbol = dlsym(handle_, name);
#endif
    if (!symbol) fail(std::string(name) + " is not exported");
    return reinterpret_cast<Function*>(reinterpret_cast<void*>(symbol));
  }

 private:
  void* handle_;
};
