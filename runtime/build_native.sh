#!/bin/sh
# Builds the native kernels with a compiler alone, to the same code as CMakeLists.txt:
#   sh runtime/build_native.sh runtime/moepack_runtime/_native/libmoepack_native.so
# For machines without cmake; CXX names another compiler than g++.
set -eu
out=$1
here=$(dirname "$0")/csrc
cxx=${CXX:-g++}
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT

common="-std=c++17 -O3 -fPIC -ffp-contract=off -fvisibility=hidden -Wall -Wextra -Wno-psabi
  -fno-trapping-math -fno-math-errno"
plain="api guard linear moe solver tape threads isa_portable"
avx512="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c
  -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized"
case $(uname -m) in
  x86_64) common="$common -DMOEPACK_X86"; special="isa_avx2 isa_avx512 isa_avx512_vbmi" ;;
  aarch64) common="$common -DMOEPACK_NEON"; special=isa_neon ;;
  *) special= ;;
esac

waiting=
for name in $plain $special; do
  case $name in
    isa_avx2) more="-mavx2 -mfma -mf16c" ;;
    isa_avx512) more=$avx512 ;;
    isa_avx512_vbmi) more="$avx512 -mavx512vbmi" ;;
    isa_neon) more="-march=armv8.2-a+dotprod" ;;
    *) more= ;;
  esac
  # Unquoted: each holds several options.
  $cxx $common $more -c "$here/$name.cpp" -o "$objects/$name.o" &
  waiting="$waiting $!"
done
for job in $waiting; do wait "$job"; done
mkdir -p "$(dirname "$out")"
$cxx -shared -pthread "$objects"/*.o -o "$out.new"
mv "$out.new" "$out"
