"""What ``clean`` takes: folders of images, tables, texts, arrays, data sets of the hub's form.

- ``items``: what all of them become, and the checks that all share;
- ``images``, ``tables``, ``arrays``, ``hub``: one file a form, its reader and its writer;
- ``recognise``: which of them a path or an object is;
- ``trusted``: which rows somebody has verified.
"""
