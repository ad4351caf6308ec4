//! Operations as a table, from which the type, the printer and the parser are made.

macro_rules! operations {
    ($(#[$enum_doc:meta])* $enum:ident: $($(#[$doc:meta])* $name:ident $word:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })+) => {
        $(#[$enum_doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum $enum {
            $($(#[$doc])* $name { $($(#[$field_doc])* $field: $type),* },)+
        }

        impl $enum {
            /// The words that lines begin with.
            pub const WORDS: &[&str] = &[$($word),+];
        }

        impl std::fmt::Display for $enum {
            fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self {
                    $(Self::$name { $($field),* } => {
                        out.write_str($word)?;
                        $(write!(out, " {}={}", stringify!($field), $crate::scenario::words::Printed($field))?;)*
                    })+
                }
                Ok(())
            }
        }

        impl std::str::FromStr for $enum {
            type Err = String;

            fn from_str(line: &str) -> Result<Self, String> {
                let mut words = line.split_whitespace();
                let word = words.next().ok_or("an empty line")?;
                let mut fields = $crate::scenario::words::Fields::of(words)?;
                let operation = match word {
                    $($word => Self::$name { $($field: fields.take(stringify!($field))?),* },)+
                    _ => return Err(format!("`{word}` is no operation")),
                };
                fields.end()?;
                Ok(operation)
            }
        }
    };
}

pub(crate) use operations;
