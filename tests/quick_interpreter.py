"""Triton's interpreter in less time, with the same results.

At every launch it reads all members of the language to find those that it must replace, and again at every call of one
jit function by another, where they are replaced already; and it builds a table of all dtypes for each dtype that it
looks up. That is up to half of the time of small kernels.
"""

import inspect
from functools import cache


def install():
    """Makes them faster for the rest of the process. TRITON_INTERPRET is read here, when triton is imported."""
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    numpy_dtype_of, numpy_dtypes = interpreter._get_np_dtype, {}
    replace_language = interpreter._patch_lang

    @cache
    def languages(function):
        return [value for value in function.__globals__.values() if value is language or value is core]

    def replace_language_once(function):
        used = (core.tensor.__add__, *(module.program_id for module in languages(function)))
        replaced = len(used) > 1 and not any(map(core.is_builtin, used))
        return interpreter._LangPatchScope() if replaced else replace_language(function)

    @cache
    def names_of_builtins(package):
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def replace_builtins(package, builder, scope):
        for name in names_of_builtins(package):
            member = getattr(package, name)
            if core.is_builtin(member):  # not yet replaced
                interpreter._patch_attr(package, name, member, builder, scope)

    def numpy_dtype(dtype):
        if type(dtype.scalar) is not core.dtype:  # a pointer
            return numpy_dtype_of(dtype)
        name = dtype.scalar.name
        if name not in numpy_dtypes:
            numpy_dtypes[name] = numpy_dtype_of(dtype)
        return numpy_dtypes[name]

    interpreter._patch_lang, interpreter._patch_builtin = replace_language_once, replace_builtins
    interpreter._get_np_dtype = numpy_dtype
