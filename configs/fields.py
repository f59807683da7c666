"""Kinds of fields of a configuration."""

from ml_collections.config_dict import FieldReference


def any_type(value) -> FieldReference:
    """A field that also takes values of another type than its default's, such as a name, a tuple of names or None."""
    return FieldReference(value, field_type=object)
