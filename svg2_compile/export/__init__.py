"""The offline door: rewrite an exported program, save it, load it, package it.

sp = svg2_compile.transform(torch.export.export(model, args, kwargs), top_p=0.9)
svg2_compile.save(sp, "wan_svg2.pt2")
run = svg2_compile.load("wan_svg2.pt2")
"""
