//! Amounts as Kubernetes writes them.

/// Bytes of a GiB.
pub const GIB: f64 = 1024.0 * 1024.0 * 1024.0;

/// Writes a number without a fraction as people do, `3` and not `3.0`: what is derived from a manifest,
/// such as the name of its run, must not depend on it.
#[expect(clippy::ref_option, reason = "serde gives a field by reference")]
pub(super) fn as_written<S: serde::Serializer>(
    number: &Option<f64>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match number {
        None => serializer.serialize_none(),
        Some(number) if number.fract() == 0.0 && number.abs() < 1e15 => {
            serializer.serialize_i64(*number as i64)
        }
        Some(number) => serializer.serialize_f64(*number),
    }
}

/// Reads an amount of bytes.
///
/// # Source
/// `Quantity` of apimachinery/pkg/api/resource.
pub(super) fn bytes(quantity: &str) -> Option<u64> {
    let is_of_number = |character: char| character.is_ascii_digit() || character == '.';
    let (number, unit) =
        quantity.split_at(quantity.find(|c| !is_of_number(c)).unwrap_or(quantity.len()));
    let factor = match unit {
        "m" => 1e-3,
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => GIB,
        "Ti" => 1024.0 * GIB,
        "Pi" => 1024.0 * 1024.0 * GIB,
        "Ei" => GIB * GIB,
        // An exponent is part of the number.
        _ => return quantity.parse::<f64>().ok().map(|bytes| bytes as u64),
    };
    Some((number.parse::<f64>().ok()? * factor) as u64)
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn reads_what_kubernetes_writes() {
        for (quantity, expected) in [
            ("1500M", Some(1_500_000_000)),
            ("1.5Gi", Some(3 << 29)),
            ("512Mi", Some(512 << 20)),
            ("1024", Some(1024)),
            ("2e9", Some(2_000_000_000)),
            ("2000000000000m", Some(2_000_000_000)),
            ("1Pi", Some(1 << 50)),
            ("many", None),
            ("1Gib", None),
        ] {
            assert_eq!(bytes(quantity), expected, "{quantity}");
        }
    }
}
