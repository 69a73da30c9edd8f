# SPDX-License-Identifier: Apache-2.0
"""How the operators are computed: a design space per operator and kind of target (tvmdcn.schedules).

A design space is a plain function of a TVM ``Schedule``. It finds the blocks of ``tvmdcn/te`` by their names,
and cannot change what they compute. Files bear the names of those in ``tvmdcn/te``; ``tvmdcn/space.py`` loads
them.
"""
