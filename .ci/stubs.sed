# What tensorrt-stubs needs to be legal: `sed -E` over tensorrt_bindings/tensorrt.pyi of 10.13.0.35.1.
# A variable of the module is named bool and hides the builtin.
s/^from __future__ import annotations$/&\nimport builtins/
s/: bool\b/: builtins.bool/g
s/-> bool:/-> builtins.bool:/
# A keyword, and a parameter without a default behind others that have one.
s/\bin: /in_: /
s/(channel_axis: int)(\) -> IScaleLayer)/\1 = ...\2/
# "behaves like a tuple", its documentation says.
s/^class Dims:/class Dims(list[int]):/
