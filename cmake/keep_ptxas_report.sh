#!/bin/sh
# Launches a CUDA compiler (the arguments are its command) that is told -Xptxas=-v. What ptxas says
# of registers goes to OBJECT.ptxas, beside the object, where test_kernel_resources.py reads it; all
# else that the compiler says is printed as ever. ccache repeats both.
object= previous=
for argument; do
  [ "$previous" != -o ] || object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"

"$@" 2>"$object.stderr"
status=$?
# No more than these lines: warnings of lost speed are called ptxas info as well.
report='^ptxas info +: (Compiling entry function|Function properties for|Used [0-9]+ registers|'
report="$report"'Compile time|[0-9]+ bytes gmem)|^ +[0-9]+ bytes stack frame'
grep -E "$report" "$object.stderr" >"$object.ptxas"
grep -Ev "$report" "$object.stderr" >&2
rm -f "$object.stderr"
exit $status
