"""The x86 vocabulary: registers, flags, descriptors, exceptions, opcode leaves and their flag effects."""
