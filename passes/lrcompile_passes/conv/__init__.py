"""Low rank for Conv: a kernel as a chain of smaller ones, each again a Conv. Shapes of one group of channels, c in and n out:

    conv-channel   window c -> r,   1x1 r -> n                              r (c s + n),  s the points of the window
    conv-spatial   along one axis c -> r,   along the others r -> n         r (c k + n s / k)
    tucker2        1x1 c -> q,   window q -> r,   1x1 r -> n                q c + q r s + r n
    cp             1x1 c -> r,   a depthwise one an axis,   1x1 r -> n      r (c + k1 + k2 + .. + n)

A 1x1 Conv is a matrix that every pixel meets: there `conv-channel` is `svd`. Each stage keeps the stride, dilation and padding of the
axes that it sees (zeros before and after, or SAME_UPPER and SAME_LOWER, which are rules for one axis at a time), so the chain gives
what a Conv with the composed kernel gives, at the borders too; the bias stays where it was, at the last stage. With groups of
channels every stage has as many groups, each factorized by itself to one rank for all.

channel.py spatial.py tucker.py cp.py: a form each.  problem.py: what is minimised.  chain.py: what stages cost and how they are emitted.
A tensor train of the kernel is no form of its own here: docs/conv.md says why, with figures.
"""

from __future__ import annotations

from lrcompile.interfaces import Factorization
from lrcompile_passes.conv.channel import Channel
from lrcompile_passes.conv.cp import Cp
from lrcompile_passes.conv.spatial import Spatial
from lrcompile_passes.conv.tucker import Tucker2

factorizations: tuple[Factorization, ...] = (Channel(), Spatial(), Tucker2(), Cp())
