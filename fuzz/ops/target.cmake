# Included by rgexport/kernels/onnx/CMakeLists.txt where -DPROGRAM names this file: the kernels with
# their own flags for each instruction set, watched by the fuzzer and by sanitizers.
set(HERE ${CMAKE_CURRENT_LIST_DIR})
set(TESTS ${HERE}/../../tests/kernels/onnx)
set(WATCHED -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=vptr
  -fsanitize-coverage=inline-8bit-counters,pc-table
  "SHELL:-mllvm -asan-instrumentation-with-call-threshold=0")
# Checks of each load, of which these files have so many that compiling them takes five times as long;
# GCC makes them in tests/kernels/onnx/test_programs.py.
set(OF_LOADS -fno-sanitize=null,alignment,object-size,pointer-overflow)

list(REMOVE_ITEM SOURCES src/floats.cpp src/quant_kernels.cpp)
foreach(source IN LISTS SOURCES)
  if(source MATCHES "quant_matmul_")
    set_property(SOURCE ${source} APPEND PROPERTY COMPILE_OPTIONS ${OF_LOADS})
  endif()
  if(source MATCHES "quant_matmul_amx")
    set_property(SOURCE ${source} APPEND PROPERTY
      COMPILE_OPTIONS --include=${TESTS}/amx_emulated.h)
  endif()
endforeach()
add_library(watched OBJECT ${SOURCES})
target_compile_options(watched PRIVATE ${WATCHED})

# What judges is neither watched nor slowed down.
add_executable(fuzz_ops $<TARGET_OBJECTS:watched> ${HERE}/fuzz_ops.cpp ${HERE}/dispatch.cpp
  ${HERE}/oracle_linear.cpp ${HERE}/oracle_attention.cpp ${HERE}/oracle_recurrent.cpp
  ${HERE}/oracle_pointwise.cpp)
target_include_directories(fuzz_ops PRIVATE src ${HERE} ${TESTS})
target_compile_options(fuzz_ops PRIVATE -O2 -g1 -ffp-contract=off)
target_link_options(fuzz_ops PRIVATE -fsanitize=fuzzer,address,undefined)
