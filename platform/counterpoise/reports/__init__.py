"""Reports: what finished runs say, as tables, pictures and one self-contained page.

Everything is read from run folders, so a report can be written anywhere the folders can be reached.
"""
